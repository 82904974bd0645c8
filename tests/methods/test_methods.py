"""Laws of the hooks that all methods share, of FedAvg and of FedProx."""

from dataclasses import dataclass, fields, replace
from itertools import permutations

import pytest
import torch
from conftest import answers, random_bools, random_vector, reply_of, started, state_of, tiny_config

from feddip_lite.core.message import num_bytes
from feddip_lite.core.plan import LocalResult
from feddip_lite.methods.base import Method, mean_buffers
from feddip_lite.methods.fedavg import FedAvg, FedProx
from feddip_lite.methods.registry import METHODS, settings_of
from feddip_lite.train.setup import build_method

VARIANTS = [(name, preset) for name, method in METHODS.items() for preset in method.presets]


@pytest.fixture
def fedavg(layout):
    return FedAvg(layout=layout, rounds=10, seed=0)


def test_merge_is_the_mean_weighted_by_samples(fedavg, layout):
    replies = {
        7: reply_of(random_vector(229, 1), 30, torch.ones(6)),
        2: reply_of(random_vector(229, 2), 10, torch.zeros(6)),
    }
    new = fedavg.merge(state_of(layout), replies, 0)
    expected = 0.25 * random_vector(229, 2).double() + 0.75 * random_vector(229, 1).double()
    assert torch.equal(new.weights, expected.float())
    assert torch.equal(new.buffers, torch.full((6,), 0.75))
    assert new.round == 1


def test_merge_of_one_reply_is_that_reply(fedavg, layout):
    weights = random_vector(layout.size, 1)
    assert torch.equal(fedavg.merge(state_of(layout), {3: reply_of(weights, 17, torch.ones(6))}, 0).weights, weights)


def test_merge_sums_in_float64(fedavg, layout):
    big, small = torch.full((layout.size,), 1e8), torch.full((layout.size,), 1.0)
    replies = {client: reply_of(value, 1, torch.zeros(6)) for client, value in enumerate([big, small, -big, small])}
    assert torch.equal(fedavg.merge(state_of(layout), replies, 0).weights, torch.full((layout.size,), 0.5))


@pytest.mark.parametrize("t", [0, 1])
@pytest.mark.parametrize(("name", "preset"), VARIANTS)
def test_merge_is_equal_for_every_order_of_replies(layout, name, preset, t):
    method = build_method(tiny_config(method=name, preset=preset).resolved(), layout)
    state = started(method, random_bools(layout.prunable), t)
    replies = answers(method, state)
    first = method.merge(state, replies, t)
    for order in permutations(replies):
        new = method.merge(state, {client: replies[client] for client in order}, t)
        assert torch.equal(new.weights, first.weights)
        assert torch.equal(new.mask, first.mask)
        assert torch.equal(new.buffers, first.buffers)


@pytest.mark.parametrize("t", [0, 1])
@pytest.mark.parametrize(("name", "preset"), VARIANTS)
def test_merge_leaves_state_and_replies_unchanged(layout, name, preset, t):
    method = build_method(tiny_config(method=name, preset=preset).resolved(), layout)
    state = started(method, random_bools(layout.prunable), t)
    replies = answers(method, state)
    given = [state.weights, state.mask, state.buffers, *state.memory.values()]
    for reply in replies.values():
        given += [part for part in (reply.values, reply.mask, *reply.extras.values()) if part is not None]
    before = [tensor.clone() for tensor in given]
    method.merge(state, replies, t)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def without_each_part(reply):
    """The reply without one of its parts, or with other counts in it; samples and loss are all methods' affair."""
    own = {name: part for name, part in reply.extras.items() if name not in ("samples", "loss")}
    if reply.values is not None:
        yield replace(reply, values=None)
        yield replace(reply, values=torch.cat([reply.values, reply.values[:1], torch.zeros(1)]))
    if reply.mask is not None:
        yield replace(reply, mask=None)
    for name, part in own.items():
        if name != "dropped":
            yield replace(reply, extras={other: them for other, them in reply.extras.items() if other != name})
        yield replace(reply, extras={**reply.extras, name: part[:-1]})


@pytest.mark.parametrize("t", [0, 1])
@pytest.mark.parametrize(("name", "preset"), VARIANTS)
def test_a_method_accepts_what_its_clients_send_and_nothing_that_lacks_a_part(layout, name, preset, t):
    method = build_method(tiny_config(method=name, preset=preset).resolved(), layout)
    state = started(method, random_bools(layout.prunable), t)
    for reply in answers(method, state).values():
        method.accept(state, reply, t)
        method.merge(state, {0: reply}, t)  # what is accepted can be merged
        for damaged in without_each_part(reply):
            with pytest.raises(ValueError, match=r"values|mask|the reply's"):
                method.accept(state, damaged, t)


def test_statistics_without_batchnorm_stay_empty(layout):
    state = replace(state_of(layout), buffers=torch.zeros(0))
    assert mean_buffers(state, {0: reply_of(torch.zeros(3), 1)}).numel() == 0


def test_dense_offer_carries_no_mask_and_a_sparse_one_only_what_its_mask_keeps(fedavg, layout):
    dense = fedavg.offer(state_of(layout), 0, 0)
    assert dense.mask is None
    assert dense.values.numel() == layout.size
    mask = random_bools(layout.prunable, 0.3)
    sparse = fedavg.offer(state_of(layout, mask), 0, 0)
    assert torch.equal(sparse.mask, mask)
    assert sparse.values.numel() == int(mask.sum()) + layout.size - layout.prunable
    assert num_bytes(sparse) < num_bytes(dense)


@pytest.mark.parametrize(("name", "preset"), VARIANTS)
def test_client_starts_from_the_sparse_model_of_the_server(layout, name, preset):
    method = build_method(tiny_config(method=name, preset=preset).resolved(), layout)
    state = replace(started(method, random_bools(layout.prunable), 1), buffers=torch.arange(6.0))
    plan = method.plan(method.offer(state, 1, 4), {}, 1)
    sparse = layout.masked(state.weights, state.mask)
    assert torch.equal(plan.buffers, state.buffers)
    if plan.mask is None:  # a client that prunes what it gets, and then trains densely
        kept = plan.weights != 0
        assert torch.equal(plan.weights, sparse * kept)
        assert 0 < int(kept.sum()) < int((sparse != 0).sum())
    else:
        assert torch.equal(plan.weights, sparse)
        assert torch.equal(plan.mask, state.mask)


def test_default_reply_is_packed_by_the_mask_that_the_server_knows(layout):
    method = Method(layout=layout, rounds=10, seed=0)
    mask = random_bools(layout.prunable, 0.3)
    weights = layout.masked(random_vector(layout.size), mask)
    reply, memory = method.reply(
        LocalResult(weights, torch.ones(6), mask, 12, torch.ones(3), torch.tensor(0.5, dtype=torch.float64)),
        {"kept": mask},
        0,
    )
    assert reply.mask is None
    assert torch.equal(method.merge(state_of(layout, mask), {0: reply}, 0).weights, weights)
    assert {name: tensor.tolist() for name, tensor in reply.extras.items()} == {
        "samples": [12], "loss": [0.5], "buffers": [1.0] * 6,
    }  # fmt: skip
    assert list(memory) == ["kept"]


@dataclass(frozen=True)
class FixedMask(Method):
    """The default hooks on a random mask."""

    def start(self):
        return random_bools(self.layout.prunable, 0.3, self.seed), {}


def test_default_method_keeps_its_mask_and_trains_the_kept_weights_only(monkeypatch, train):
    monkeypatch.setitem(METHODS, "fixed", FixedMask)
    states = [state for state, _ in train(tiny_config(method="fixed"))]
    mask = states[0].mask
    for state in states:
        assert torch.equal(state.mask, mask)
        assert torch.count_nonzero(state.weights[: len(mask)][~mask]) == 0
    assert (states[0].weights[: len(mask)] != states[1].weights[: len(mask)])[mask].float().mean() > 0.9


@pytest.mark.parametrize("method", ["feddp", "feddip"])
@pytest.mark.parametrize("preset", ["paper", "repo"])
def test_feddip_without_pruning_and_penalty_equals_fedavg(train, method, preset):
    penalty = {"penalty_max": 0.0} if method == "feddip" else {}
    if preset == "repo" and penalty:
        penalty = {"method_options": {"lambda_schedule": "eq3"}, **penalty}  # the published schedule starts at 5e-4
    plain = train(tiny_config(method="fedavg"))
    unpruned = train(tiny_config(method=method, preset=preset, initial_sparsity=0.0, target_sparsity=0.0, **penalty))
    for (a, a_record), (b, b_record) in zip(plain, unpruned, strict=True):
        assert torch.equal(a.weights, b.weights)
        assert bool(b.mask.all())
        assert (a_record.train_loss, a_record.up_bytes) == (b_record.train_loss, b_record.up_bytes)
        assert a_record.down_bytes == b_record.down_bytes


def test_feddip_memory_without_pruning_and_penalty_equals_fedavg_up_to_one_rounding(train):
    plain = train(tiny_config(method="fedavg"))[-1][0].weights
    unpruned = train(tiny_config(preset="memory", initial_sparsity=0.0, target_sparsity=0.0, penalty_max=0.0))[-1][0]
    torch.testing.assert_close(unpruned.weights, plain, rtol=1e-5, atol=1e-7)


def test_fedprox_with_mu_zero_equals_fedavg(train):
    plain, proximal = (train(tiny_config(**own)) for own in (
        {"method": "fedavg"}, {"method": "fedprox", "method_options": {"mu": 0.0}},
    ))  # fmt: skip
    for (a, a_record), (b, b_record) in zip(plain, proximal, strict=True):
        assert torch.equal(a.weights, b.weights)
        assert repr(a_record) == repr(b_record)


def test_fedprox_gradient_is_that_of_half_mu_times_the_squared_distance_to_the_global_weights(layout):
    method = FedProx(layout=layout, rounds=10, seed=0, mu=0.3)
    state = replace(state_of(layout), buffers=torch.zeros(6))
    plan = method.plan(method.offer(state, 0, 0), {}, 0)
    w = random_vector(layout.size, 5).requires_grad_()
    (0.15 * (w - state.weights).square().sum()).backward()
    gradient = random_vector(layout.size, 6)
    start = gradient.clone()
    plan.add_gradient_(gradient, w.detach(), w.detach())
    torch.testing.assert_close(gradient, start + w.grad)


def test_fedprox_pulls_clients_towards_the_global_weights(train):
    distances = []
    for mu in (0.0, 5.0):
        run = train(tiny_config(method="fedprox", method_options={"mu": mu}, rounds=2, lr=0.05))
        distances.append((run[1][0].weights - run[0][0].weights).norm())
    assert distances[1] < distances[0]


@pytest.mark.parametrize(("name", "preset"), VARIANTS)
def test_a_preset_sets_only_hyper_parameters_that_the_method_has(name, preset):
    own = {item.name for item in fields(METHODS[name])}
    assert set(METHODS[name].presets[preset]) <= own
    assert set(settings_of(name, preset)) == own - {item.name for item in fields(Method)}


@pytest.mark.parametrize(("name", "preset"), VARIANTS)
def test_a_built_method_has_the_settings_of_its_resolved_configuration(layout, name, preset):
    config = tiny_config(method=name, preset=preset, rounds=17, seed=5).resolved()
    method = build_method(config, layout)
    assert (method.rounds, method.seed, method.layout) == (17, 5, layout)
    stored = {item.name: getattr(config, item.name) for item in fields(config)} | config.method_options
    assert all(getattr(method, key) == stored[key] for key in settings_of(name, preset))
