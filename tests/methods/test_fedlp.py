"""Laws of FedLP: which tensors travel and what becomes of them, models cut to a client's complexity, private heads."""

from dataclasses import replace

import pytest
import torch
from conftest import interrupted, random_vector, reply_of, same_history, state_of, tiny_config
from torch import nn

from feddip_lite import run
from feddip_lite.core.flat import Layout
from feddip_lite.core.message import decode, encode, num_bytes
from feddip_lite.core.models import MODELS, build_model, empty_model, num_stages
from feddip_lite.core.plan import LocalResult
from feddip_lite.methods.fedlp import FedLP
from feddip_lite.train.round import sample_cohort
from feddip_lite.train.setup import prepare

LEARNS = {"width": 0.5, "local_epochs": 5, "batch_size": 16, "rounds": 10}
SHAPES = {"lenet5": (1, 28), "alexnet": (3, 32), "resnet18": (3, 32)}


def homo(layout, keep_probability=0.5, **changes):
    return FedLP(**{"layout": layout, "rounds": 10, "seed": 0, "keep_probability": keep_probability, **changes})


def hetero_config(**changes):
    options = {"variant": "hetero", **changes.pop("method_options", {})}
    return tiny_config(method="fedlp", method_options=options, **changes)


def result_of(layout, client=0, samples=5):
    """What a client of the whole model would have trained; client and slot are readable from the values."""
    loss = torch.tensor(0.5, dtype=torch.float64)
    buffers = random_vector(layout.buffer_size, 50 + client)
    return LocalResult(random_vector(layout.size, client), buffers, None, samples, torch.ones(1), loss, client=client)


def gather(vector, slots, kept):
    """The kept tensors of a flat vector, one after the other."""
    parts = [slot.of(vector).flatten() for slot, keep in zip(slots, kept, strict=True) if keep]
    return torch.cat([vector[:0], *parts])


def drops(method, t, client):
    """Which tensors `client` drops in round t."""
    reply, _ = method.reply(result_of(method.layout, client), {}, t)
    none = torch.zeros(len(method.tensors), dtype=torch.bool)
    return reply.extras.get("dropped", none)


# homo


def test_a_reply_holds_the_tensors_that_were_not_dropped_and_nothing_else(layout):
    method = homo(layout)
    for client in range(20):
        result = result_of(layout, client)
        reply, memory = method.reply(result, {}, 3)
        kept = (~drops(method, 3, client)).tolist()
        assert torch.equal(reply.values, gather(result.weights, layout.slots, kept[: len(layout.slots)]))
        statistics = gather(result.buffers, layout.buffer_slots, kept[len(layout.slots) :])
        assert torch.equal(reply.extras.get("buffers", torch.zeros(0)), statistics)
        assert memory == {}
        assert len(encode(reply)) == num_bytes(reply)
        assert torch.equal(decode(encode(reply), layout).values, reply.values)


def test_every_tensor_is_kept_with_the_probability_asked_for_independently_of_the_others(layout):
    method = homo(layout, 0.3)
    kept = torch.stack([~drops(method, t, client) for t in range(40) for client in range(25)]).double()
    assert kept.mean(0).tolist() == pytest.approx([0.3] * 7, abs=0.06)  # 4 standard errors of 1000 draws
    correlation = torch.corrcoef(kept.T) - torch.eye(7)
    assert correlation.abs().max() < 0.13


def test_the_draw_is_a_function_of_seed_round_and_client(layout):
    method = homo(layout)
    assert torch.equal(drops(method, 3, 1), drops(homo(layout), 3, 1))
    addresses = [(0, 3, 1), (0, 3, 2), (0, 4, 1), (1, 3, 1), (0, 1, 3)]
    draws = {tuple(drops(homo(layout, seed=seed), t, client).tolist()) for seed, t, client in addresses}
    assert len(draws) > 3


def test_the_server_takes_the_plain_mean_of_the_copies_that_came_and_keeps_the_old_tensor_where_none_did(layout):
    method, state = homo(layout, 0.3), replace(state_of(layout, seed=9), buffers=random_vector(6, 8))
    results = {client: result_of(layout, client, samples=10 ** (client % 3)) for client in (4, 1, 7)}
    replies = {client: method.reply(result, {}, 5)[0] for client, result in results.items()}
    new = method.merge(state, replies, 5)
    numbers = set()
    for k, slot in enumerate(method.tensors):
        old, of, after = (state.weights, "weights", new.weights)
        if k >= len(layout.slots):
            old, of, after = (state.buffers, "buffers", new.buffers)
        copies = [slot.of(getattr(results[c], of)).double() for c in (1, 4, 7) if not drops(method, 5, c)[k]]
        expected = (sum(copies) / len(copies)).float() if copies else slot.of(old)
        assert torch.equal(slot.of(after), expected)
        numbers.add(len(copies))
    assert {0, 1} < numbers  # the law was tried with none, one and several copies


def test_with_probability_0_the_model_stays_and_with_1_replies_are_those_of_fedavg(train):
    nothing = train(tiny_config(method="fedlp", method_options={"keep_probability": 0.0}))
    assert torch.equal(nothing[0][0].weights, nothing[-1][0].weights)
    everything = train(tiny_config(method="fedlp", method_options={"keep_probability": 1.0}))
    plain = train(tiny_config(method="fedavg"))
    assert [record.up_bytes for _, record in everything] == [record.up_bytes for _, record in plain]
    assert everything[0][1].train_loss == plain[0][1].train_loss


def test_fewer_bytes_go_up_the_smaller_the_probability_and_the_download_stays_dense(train):
    runs = [train(tiny_config(method="fedlp", method_options={"keep_probability": p})) for p in (0.2, 0.8, 1.0)]
    up = [sum(record.up_bytes for _, record in rounds) for rounds in runs]
    assert up == sorted(up)
    assert up[0] < 0.6 * up[-1]
    assert len({tuple(record.down_bytes for _, record in rounds) for rounds in runs}) == 1


# Models that can be cut


@pytest.mark.parametrize("name", SHAPES)
def test_a_prefix_computes_what_the_whole_model_computes_up_to_there(name):
    channels, size = SHAPES[name]
    shape = {"classes": 7, "width": 0.1, "channels": channels, "size": size}
    whole, images = build_model(name, **shape, seed=1).eval(), torch.rand(2, channels, size, size)
    sizes = []
    for depth in range(1, num_stages(name) + 1):
        prefix = empty_model(name, depth, **shape).eval()
        own = {key.removeprefix("trunk."): tensor for key, tensor in prefix.state_dict(keep_vars=True).items()}
        with torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(whole.state_dict().get(key, torch.ones_like(tensor)))
        expected = whole.vector(whole.features(images, depth)).sum(1, keepdim=True) + 1  # a head of ones
        torch.testing.assert_close(prefix(images), expected.expand(-1, 7))
        assert {key for key in own if not key.startswith("head.")} < set(whole.state_dict())
        sizes.append(Layout.of(prefix.trunk).size)
    assert torch.equal(whole.features(images), whole.features(images, num_stages(name)))
    assert sizes == sorted(set(sizes))


def test_lenet5_is_cut_after_its_first_and_its_second_convolution(federation):
    method = federation(hetero_config())[2]
    convolutions = [["conv1.weight", "conv1.bias"], ["conv1.weight", "conv2.weight", "conv1.bias", "conv2.bias"]]
    shared = [[slot.name for slot, kept in zip(method.tensors, part, strict=True) if kept] for part in method.parts]
    assert shared == [*convolutions, [slot.name for slot in method.layout.slots]]


def test_a_model_that_names_no_stages_is_refused(monkeypatch):
    class Plain(nn.Sequential):
        def __init__(self, classes, width, channels, size):
            super().__init__(nn.Flatten(), nn.Linear(channels * size * size, classes))

    monkeypatch.setitem(MODELS, "plain", Plain)
    with pytest.raises(ValueError, match="variant: 'hetero' is not valid with a model that names no stages"):
        prepare(hetero_config(model="plain"))


def test_a_complexity_that_the_model_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"preference: 4 is not valid; expected an integer in \[0, 3\]"):
        prepare(hetero_config(method_options={"preference": 4}))


# hetero


@pytest.mark.parametrize(("preference", "shares"), [(0, [1 / 3] * 3), (1, [0.6, 0.2, 0.2]), (3, [0.2, 0.2, 0.6])])
def test_a_clients_complexity_is_drawn_once_with_60_percent_for_the_preferred(federation, preference, shares):
    method = federation(hetero_config(method_options={"preference": preference}))[2]
    drawn = torch.tensor([method.complexity(client) for client in range(2000)])
    assert [(drawn == c).double().mean().item() for c in (1, 2, 3)] == pytest.approx(shares, abs=0.04)
    assert [method.complexity(client) for client in range(2000)] == drawn.tolist()


@pytest.mark.parametrize(("model", "width"), [("lenet5", 0.3), ("resnet18", 0.03)])
def test_a_client_trains_its_share_of_the_server_model_with_its_own_head(federation, model, width):
    state, _, method = federation(hetero_config(model=model, width=width))
    state = replace(state, buffers=torch.rand(len(state.buffers)))
    clients = {method.complexity(client): client for client in range(200)}
    assert set(clients) == set(range(1, len(method.parts) + 1))
    for complexity, client in clients.items():
        plan = method.plan(method.offer(state, 0, client), {}, 0)
        if complexity == len(method.parts):
            assert plan.model is None
            assert torch.equal(plan.weights, state.weights)
            continue
        whole = {slot.name: slot for slot in method.tensors}
        own = plan.model.layout
        for slots, vector, source in ((own.slots, plan.weights, state.weights),) + (
            ((own.buffer_slots, plan.buffers, state.buffers),) if own.buffer_slots else ()
        ):
            for slot in slots:
                if not slot.name.startswith("head."):
                    assert torch.equal(slot.of(vector), whole[slot.name.removeprefix("trunk.")].of(source))
        head = [slot.of(plan.weights) for slot in own.slots if slot.name.startswith("head.")]
        bound = head[0].shape[1] ** -0.5
        assert all(0.2 * bound < part.abs().max() <= bound for part in head)
        assert torch.equal(plan.weights, method.plan(method.offer(state, 5, client), {}, 5).weights)


def test_a_head_stays_at_its_client_and_is_where_the_next_round_starts(federation, train):
    config = hetero_config(clients=3, clients_per_round=3, method_options={"preference": 1})
    method = federation(config)[2]
    client = next(c for c in range(3) if method.complexity(c) < 3)
    first, second = (state.memories for state, _ in train(config)[:2])
    state = federation(config)[0]
    plan = method.plan(method.offer(state, 1, client), first[client], 1)
    slots = plan.model.layout.slots
    heads = [slot.name.startswith("head.") for slot in slots]
    assert torch.equal(gather(plan.weights, slots, heads), first[client]["head"])
    assert not torch.equal(first[client]["head"], second[client]["head"])
    result = LocalResult(plan.weights, torch.zeros(0), None, 5, torch.ones(1), torch.tensor(0.5), client=client)
    reply, _ = method.reply(result, first[client], 1)
    assert torch.equal(reply.values, method.offer(state, 1, client).values)
    assert set(reply.extras) == {"samples", "loss"}


def test_the_server_averages_each_tensor_over_the_clients_that_have_it(federation):
    state, _, method = federation(hetero_config())
    clients = {method.complexity(client): client for client in range(100)}
    replies = {}
    for client in clients.values():
        trained = replace(state, weights=random_vector(method.layout.size, client))
        replies[client] = reply_of(method.offer(trained, 0, client).values, 1 + client)
    new = method.merge(state, replies, 0).weights
    have = {"conv1": (1, 2, 3), "conv2": (2, 3), "fc": (3,)}
    for slot in method.layout.slots:
        holders = sorted(clients[c] for c in next(v for key, v in have.items() if slot.name.startswith(key)))
        copies = [slot.of(random_vector(method.layout.size, c)).double() for c in holders]
        assert torch.equal(slot.of(new), (sum(copies) / len(copies)).float())
    alone = method.merge(state, {clients[1]: replies[clients[1]]}, 0).weights
    changed = [slot.name for slot in method.layout.slots if not torch.equal(slot.of(alone), slot.of(state.weights))]
    assert changed == ["conv1.weight", "conv1.bias"]


def test_merging_has_the_same_bits_for_every_order_of_replies(federation):
    state, _, method = federation(hetero_config())
    replies = {c: method.offer(replace(state, weights=random_vector(len(state.weights), c)), 0, c) for c in range(9)}
    first = method.merge(state, replies, 0).weights
    assert torch.equal(method.merge(state, dict(reversed(replies.items())), 0).weights, first)


def test_bytes_are_those_of_the_shared_parts(train, federation):
    config = hetero_config()
    state, _, method = federation(config)
    for t, (_, record) in enumerate(train(config)):
        sent = [num_bytes(method.offer(state, t, client)) for client in sample_cohort(config, t)]
        assert record.down_bytes == sum(sent)
        assert record.up_bytes == sum(sent) + 39 * len(sent)  # number of samples and loss


# Whole runs


@pytest.mark.parametrize("options", [{}, {"variant": "hetero", "preference": 3}])
def test_fedlp_learns_digits(options):
    history = run(tiny_config(method="fedlp", method_options=options, **LEARNS), progress=False)
    assert history["accuracy"].iloc[-1] > 0.6
    assert history["sparsity"].max() == 0


@pytest.mark.parametrize("model", ["lenet5", "alexnet", "resnet18"])
def test_every_model_trains_at_every_complexity(train, federation, model):
    width = {"lenet5": 0.3, "alexnet": 0.05, "resnet18": 0.05}[model]
    config = hetero_config(model=model, width=width, clients=60, clients_per_round=8, rounds=1, workers=3)
    method = federation(config)[2]
    ((state, record),) = train(config)
    assert state.weights.isfinite().all()
    part = [c for c in sample_cohort(config, 0) if method.complexity(c) < len(method.parts)]
    assert sorted(state.memories) == part
    assert len({memory["head"].numel() for memory in state.memories.values()}) > 1


def test_resumed_run_equals_the_uninterrupted(tmp_path):
    config = hetero_config(clients=4, clients_per_round=3)
    count, history = interrupted(config, tmp_path)
    assert count == 2
    assert same_history(history, run(config, progress=False))


@pytest.mark.parametrize("variant", ["homo", "hetero"])
def test_workers_never_change_a_bit(train, variant):
    runs = [train(tiny_config(method="fedlp", method_options={"variant": variant}, workers=n)) for n in (1, 3)]
    assert torch.equal(runs[0][-1][0].weights, runs[1][-1][0].weights)
