"""Laws of what travels coded: without a codec as it is; the master loses nothing; feedback loses nothing for good."""

from dataclasses import replace

import pytest
import torch
from conftest import interrupted, random_bools, random_vector, reply_of, same_history, state_of, tiny_config

from feddip_lite import run
from feddip_lite.core.codecs import QSGD, Fp16, Fp32, Sign, Ternary, TopK
from feddip_lite.core.errors import Diverged, Note
from feddip_lite.core.message import Message, decode, encode, num_bytes
from feddip_lite.methods import METHODS
from feddip_lite.methods.fedavg import FedAvg
from feddip_lite.methods.feddip import FedDIP
from feddip_lite.records.store import read_model
from feddip_lite.train.checkpoint import load_checkpoint
from feddip_lite.train.round import run_round
from feddip_lite.train.transport import FEEDBACK, answered, methods_part, received, sent, taken

CPU = torch.device("cpu")
Q = "qsgd:8:512"
X4 = {"method_options": {"upload": "masked", "mask_source": "masked_average"}, "up": Q, "down": Q}
X4T = {"preset": "memory", "up": Q, "up_pruned": "ternary:512", "down": Q}
SMALL = {"width": 0.1, "rounds": 2, "clients": 3, "clients_per_round": 2}


def method_of(layout, kind=FedAvg, **codecs):
    return kind(layout, rounds=10, seed=0, **codecs)


def exchanged(method, state, change, memory=None, estimate=None, t=0, client=0):
    """What one client's `change` (n,) of what it received becomes on its way: (reply as read, memory, estimate, what it
    trained). Everything crosses the wire as bytes."""

    def over_the_wire(message):
        data = encode(message)
        assert len(data) == num_bytes(message)
        return decode(data, method.layout)

    offer = method.offer(state, t, client)
    arrived = received(method, over_the_wire(sent(method, offer, t, client)), CPU)
    trained = method.layout.unpack(arrived.values, arrived.mask) + change
    reply = reply_of(method.layout.pack(trained, arrived.mask), 5)
    message, memory = answered(method, reply, arrived, memory or {}, t, client)
    reply, estimate = taken(method, over_the_wire(message), offer, estimate)
    return reply, memory, estimate, trained


def dyadic(size, seed):
    """Small multiples of 1/8: sums of a few are exact in float32."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-64, 64, (size,), generator=draw).float() / 8


def test_without_a_codec_every_message_passes_as_it_is(layout):
    method, state = method_of(layout), state_of(layout)
    offer = method.offer(state, 0, 0)
    reply = reply_of(state.weights, 3)
    assert sent(method, offer, 0, 0) is offer and received(method, offer, CPU) is offer
    message, memory = answered(method, reply, offer, {}, 0, 0)
    assert message is reply and memory == {}
    assert taken(method, message, offer, None) == (reply, None)


@pytest.mark.parametrize("codec", [Fp16(), QSGD(8, 16), Ternary(16), TopK(0.1), Sign()], ids=lambda codec: codec.name)
def test_what_is_lost_on_the_way_down_never_enters_the_master(layout, codec):
    """w_n - v' goes up and is added to v: a client that changes nothing leaves the server's float32 where they were."""
    for up in (Fp32(), codec):
        method, state = method_of(layout, up=up, down=codec), state_of(layout)
        reply, *_ = exchanged(method, state, torch.zeros(layout.size))
        assert torch.equal(reply.values, state.weights)


def test_the_sparse_download_is_coded_at_its_kept_weights_and_the_change_comes_back_at_them(layout):
    mask = random_bools(layout.prunable, 0.4)
    method, state = method_of(layout, up=QSGD(16, 8), down=QSGD(8, 8)), state_of(layout, mask)
    change = layout.masked(random_vector(layout.size, 5) / 100, mask)
    reply, _, _, trained = exchanged(method, state, change)
    kept = int(mask.sum()) + layout.size - layout.prunable
    assert len(reply.values) == kept
    assert torch.allclose(reply.values, layout.pack(state.weights + change, mask), atol=1e-5)
    assert not torch.allclose(layout.pack(trained, mask), reply.values, atol=1e-5)  # it began at what arrived
    down = sent(method, method.offer(state, 0, 0), 0, 0)
    assert [name for name in down.extras if "qsgd" in name] == ["values qsgd:8:8"] and down.values is None
    assert len(down.extras["values qsgd:8:8"]) == 4 + kept + 4 * -(-kept // 8)


def test_a_dense_upload_has_two_parts_if_the_pruned_weights_have_a_codec_of_their_own(layout):
    mask = random_bools(layout.prunable, 0.4)
    method = method_of(layout, FedDIP, up=QSGD(16, 8), up_pruned=TopK(1.0), server_memory=True)
    state, change = state_of(layout, mask, t=1), random_vector(layout.size, 6)
    offer = method.offer(state, 1, 0)
    message, _ = answered(method, reply_of(layout.masked(state.weights, mask) + change, 5), offer, {}, 1, 0)
    assert sorted(set(message.extras) - {"samples", "loss"}) == ["pruned topk:1", "values qsgd:16:8"]
    reply, _ = taken(method, message, offer, None)
    assert torch.allclose(reply.values, layout.masked(state.weights, mask) + change, atol=1e-3)
    pruned = ~mask
    assert torch.equal(reply.values[: layout.prunable][pruned], change[: layout.prunable][pruned])
    dense = method.offer(state_of(layout), 0, 0)  # nothing is pruned: one part
    message, _ = answered(method, reply_of(change, 5), dense, {}, 0, 0)
    assert "pruned topk:1" not in message.extras


@pytest.mark.parametrize("codec", [TopK(0.1), Sign(), QSGD(4, 8)], ids=lambda codec: codec.name)
@pytest.mark.parametrize("sparse", [False, True])
def test_error_feedback_telescopes(layout, codec, sparse):
    """Sum of what arrived = sum of the changes + e_0 - e_T, at every coordinate that travelled; others keep theirs."""
    method, memory = method_of(layout, up=codec, up_feedback="ef"), {}
    arrived, changed = torch.zeros(layout.size), torch.zeros(layout.size)
    for t in range(12):
        mask = random_bools(layout.prunable, 0.5, seed=t // 4) if sparse else None
        state = state_of(layout, mask, seed=t, t=t)
        change = random_vector(layout.size, 100 + t)
        change = change if mask is None else layout.masked(change, mask)
        reply, memory, _, _ = exchanged(method, state, change, memory, t=t)
        offer = method.offer(state, t, 0)
        arrived += layout.unpack(reply.values, offer.mask) - layout.unpack(offer.values, offer.mask)
        changed += change
    assert torch.allclose(arrived + memory[FEEDBACK], changed, atol=1e-4)
    assert float((arrived - changed).norm()) > 0.1  # something is still under way


def test_ef21_with_the_identity_is_plain_and_both_ends_believe_the_same(layout):
    method, state = method_of(layout, up=Fp32(), down=TopK(1.0), up_feedback="ef21"), None
    memory, estimate = {}, None
    for t in range(5):  # multiples of 1/8: the differences are exact
        state = replace(state_of(layout, t=t), weights=dyadic(layout.size, t))
        change = dyadic(layout.size, 50 + t)
        reply, memory, estimate, trained = exchanged(method, state, change, memory, estimate, t)
        assert torch.equal(reply.values, trained)
        assert torch.equal(memory[FEEDBACK], estimate) and torch.equal(estimate, change)


def test_ef21_comes_to_a_change_that_stays_and_both_ends_believe_the_same(layout):
    method, memory, estimate = method_of(layout, up=TopK(0.1), up_feedback="ef21"), {}, None
    change, state, distances = random_vector(layout.size, 7), state_of(layout), []
    for t in range(12):
        reply, memory, estimate, _ = exchanged(method, state, change, memory, estimate, t)
        assert torch.equal(memory[FEEDBACK], estimate)
        distances.append(float((reply.values - state.weights - change).norm()))
    assert all(
        after <= before * (1 - 0.1) ** 0.5 + 1e-5 for before, after in zip(distances, distances[1:], strict=False)
    )
    assert distances[-1] < 1e-4  # a tenth of the coordinates each time


def test_rounding_has_an_address_in_round_client_and_direction(layout):
    method, state = method_of(layout, up=QSGD(2, 16), down=QSGD(2, 16)), state_of(layout)
    offer = method.offer(state, 0, 0)

    def bits(t, client):
        return encode(sent(method, offer, t, client))

    assert bits(0, 0) == bits(0, 0)
    assert len({bits(t, client) for t in range(3) for client in range(3)}) == 9
    assert len({encode(sent(replace(method, seed=seed), offer, 0, 0)) for seed in range(3)}) == 3
    zero = replace(offer, values=torch.zeros_like(offer.values))
    up = answered(method, reply_of(offer.values, 5), zero, {}, 0, 0)[0]  # the same numbers, the other way
    assert not torch.equal(up.extras["values qsgd:2:16"], sent(method, offer, 0, 0).extras["values qsgd:2:16"])


def test_what_the_codec_remembers_is_none_of_the_methods_business():
    own = {"head": torch.ones(2)}
    assert methods_part({**own, FEEDBACK: torch.ones(3)}) == own
    assert methods_part(own) is own


def with_extra(message, name, data):
    return Message(None, message.mask, {**message.extras, name: torch.tensor(list(data), dtype=torch.uint8)})


def test_a_reply_in_another_code_than_asked_for_is_refused(layout):
    method, state = method_of(layout, up=QSGD(8, 16), down=Fp16()), state_of(layout)
    offer = method.offer(state, 0, 0)
    plain = reply_of(state.weights, 5)
    other = answered(replace(method, up=Fp16()), plain, offer, {}, 0, 0)[0]
    right = answered(method, plain, offer, {}, 0, 0)[0]
    name = "values qsgd:8:16"
    cases = {
        "holds 'values fp16'; expected 'values qsgd:8:16'": other,
        "values are not coded; expected 'values qsgd:8:16'": plain,
        "holds 'pruned sign'": with_extra(right, "pruned sign", b"\0" * 9),
        "more than 229 numbers, or cut": with_extra(right, name, b"\xff" * 9),
        "must be": with_extra(right, name, right.extras[name].tolist()[:-1]),
        "values: 3 of them; expected": with_extra(right, name, b"\3\0\0\0" + bytes(7)),
    }
    for reason, message in cases.items():
        with pytest.raises(ValueError, match=reason) as caught:
            taken(method, message, offer, None)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="the offer's values are not coded; expected 'values fp16'"):
        received(method, offer, CPU)


def test_a_reply_without_values_passes_and_one_that_is_not_finite_is_refused(layout):
    method, state = method_of(layout, up=QSGD(8, 16), down=Fp16(), up_feedback="ef"), state_of(layout)
    offer, memory = method.offer(state, 0, 0), {FEEDBACK: torch.ones(layout.size)}
    scores = Message(None, None, {"scores": torch.ones(3)})
    message, kept = answered(method, scores, offer, memory, 0, 0)
    assert message is scores and torch.equal(kept[FEEDBACK], memory[FEEDBACK])
    assert taken(method, scores, offer, None)[0].extras == scores.extras
    with pytest.raises(Diverged, match="NaN or infinite"):
        answered(method, reply_of(state.weights * torch.nan, 5), offer, {}, 0, 0)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_with_sixteen_bits_both_ways_does_what_it_does_plainly(method, train):
    """One round with the same data order: what 16 bits lose is a thousandth of the weights at most."""
    config = tiny_config(method=method, **{**SMALL, "rounds": 1})
    (plain, _), (coded, _) = train(config)[-1], train(replace(config, up="qsgd:16:64", down="qsgd:16:64"))[-1]
    assert float((coded.weights - plain.weights).norm() / plain.weights.norm()) < 1e-2
    assert float((coded.mask != plain.mask).float().mean()) < 0.02


@pytest.mark.parametrize("codecs", [X4, X4T, {"up": "topk:0.01", "up_feedback": "ef21"}], ids=["X4", "X4t", "EF21"])
def test_the_number_of_workers_never_changes_a_bit(codecs, train):
    config = tiny_config(**SMALL, **codecs)
    (one, first), (two, second) = train(config)[-1], train(replace(config, workers=2))[-1]
    assert torch.equal(one.weights, two.weights) and torch.equal(one.mask, two.mask)
    assert repr(first) == repr(second)


@pytest.mark.parametrize("feedback", ["ef", "ef21"])
def test_an_interrupted_run_goes_on_with_what_both_ends_remember(feedback, tmp_path):
    config = tiny_config(method="fedavg", up="topk:0.05", up_feedback=feedback, **{**SMALL, "rounds": 4})
    straight = run(config, results_dir=tmp_path / "straight", progress=False)
    count, history = interrupted(config, tmp_path / "again")
    assert count == 3 and same_history(straight, history)
    checksums = [(tmp_path / folder / f"{config.run_id}.safetensors").read_bytes() for folder in ("straight", "again")]
    assert checksums[0] == checksums[1]


def test_an_older_checkpoint_has_no_estimates(federation, tmp_path):
    config = tiny_config(**SMALL)
    assert interrupted(config, tmp_path, stops=1)[0] == 1
    assert load_checkpoint(tmp_path / f"{config.run_id}.checkpoint", config.resolved(), CPU).state.estimates == {}


def test_x4_sends_a_byte_a_kept_weight_and_keeps_the_float32_master(tmp_path, federation):
    config = tiny_config(**X4, width=0.3, rounds=6, mask_interval=2, initial_sparsity=0.5)
    state, clients, method = federation(config)
    for t in range(config.rounds):
        before, (state, record) = state, run_round(state, clients, method, config.resolved())
        numbers = config.clients_per_round * (int(before.mask.sum()) + method.layout.size - method.layout.prunable)
        assert numbers < record.up_bytes < 1.02 * numbers + 300 * config.clients_per_round
        assert t == 0 or record.down_bytes < 1.02 * numbers + 300 * config.clients_per_round + len(state.mask)
    run(config, results_dir=tmp_path, progress=False)
    model = read_model(tmp_path, config.run_id)
    assert torch.equal(model.weights, method.layout.masked(state.weights, state.mask))
    levels = model.weights[: method.layout.prunable][model.mask].unique()
    assert len(levels) > 0.99 * int(state.mask.sum())  # no grid of 255 levels


def test_feedback_at_clients_of_whom_few_take_part_is_said_to_be_stale(federation):
    few = tiny_config(method="fedavg", up="topk:0.01", up_feedback="ef", **{**SMALL, "batch_size": 8})
    with pytest.warns(Note, match="up_feedback: 'ef' with 2 of 3 clients per round: .* 1.5 rounds old on average"):
        federation(few)
