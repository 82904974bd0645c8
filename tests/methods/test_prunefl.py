"""Laws of PruneFL: which weights pay for their time, the bounds of density, increments, and what travels."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from conftest import (
    FAST,
    interrupted,
    random_bools,
    random_vector,
    reply_of,
    same_history,
    state_of,
    tiny_config,
    tiny_data,
    tiny_module,
)

from feddip_lite import run
from feddip_lite.core.flat import Layout
from feddip_lite.core.models import build_model
from feddip_lite.core.schedules import sparsity_at
from feddip_lite.core.sparsity import kept_per_layer, num_kept
from feddip_lite.methods.prunefl import PruneFL
from feddip_lite.train.client import local_update

PRESETS = pytest.mark.parametrize("preset", ["paper", "repo"])


def method_of(layout, preset="paper", **changes):
    return PruneFL(**{"layout": layout, "rounds": 20, "seed": 0, **PruneFL.presets[preset], **changes})


def free(layout, **changes):
    """PruneFL whose choice nothing bounds: every weight may go, and any number may stay."""
    bounds = {"initial_sparsity": 0.0, "target_sparsity": 1 - 1 / layout.prunable, "candidates": 1.0, "halvings": 0.0}
    return method_of(layout, **bounds, mask_interval=5, ceiling_until=1.0, **changes)


def squares_of(layout, seed=0):
    """Squared gradients with a heavy tail, (P,)."""
    return random_vector(layout.prunable, seed).pow(4)


def merge(method, state, squares, t, seed=5):
    """The state after round t of one client, whose weights are random off nothing but the mask."""
    weights = method.layout.masked(random_vector(method.layout.size, seed), state.mask)
    reply = reply_of(weights, 10, state.buffers)
    reply = replace(reply, extras={**reply.extras, "squared_gradients": squares})
    return method.merge(state, {0: reply}, t)


def test_time_of_a_weight_is_its_flops_and_its_transfer():
    module = tiny_module()
    layout = Layout.of(module, image_shape=(1, 6, 6))
    times = method_of(layout, seconds_per_flop=1e-3, seconds_per_weight=5.0).times(torch.device("cpu"))
    assert times.dtype == torch.float64
    assert times.tolist() == [5 + 2 * 16 * 1e-3] * 27 + [5 + 2e-3] * 192  # 4x4 output positions; 1


def test_layout_knows_how_often_each_weight_is_used_per_sample_and_leaves_the_model_alone():
    module = build_model("lenet5", classes=10, channels=1, size=28)
    layout = Layout.of(module, image_shape=(1, 28, 28))
    assert [slot.uses for slot in layout.prunable_slots] == [784, 100, 1, 1, 1]
    assert sum(slot.uses * (slot.stop - slot.start) for slot in layout.prunable_slots) == 416_520  # by hand
    assert module.training
    assert all(parameter.device.type == "cpu" for parameter in module.parameters())
    resnet = Layout.of(build_model("resnet18", classes=10, width=0.1, channels=3, size=32), image_shape=(3, 32, 32))
    assert {slot.uses for slot in resnet.prunable_slots} == {1024, 256, 64, 16, 1}
    assert all(slot.uses == 1 for slot in Layout.of(module).slots)


@pytest.mark.parametrize("fixed", [0.01, 0.3, 3.0])
def test_chosen_set_has_the_largest_gain_per_time_of_all_subsets(layout, fixed):
    method = free(layout, seconds_fixed=fixed, seconds_per_weight=0.1)
    gains = torch.zeros(layout.prunable)
    few = [0, 3, 30, 40, 41, 100, 150, 210]
    gains[few] = squares_of(layout)[few]
    times = method.times(gains.device)

    def ratio(chosen):
        chosen = torch.tensor(chosen)
        return float(gains.double()[chosen].sum() / (fixed + times[chosen].sum()))

    mask = method.best(torch.ones(layout.size), torch.ones(layout.prunable, dtype=torch.bool), gains, 0)
    subsets = (subset for size in range(1, 9) for subset in combinations(few, size))
    kept = mask.nonzero().squeeze(1).tolist()
    assert set(kept) <= set(few)
    assert ratio(kept) == pytest.approx(max(map(ratio, subsets)), rel=1e-12)


def test_more_time_that_no_mask_can_save_keeps_more_weights(layout):
    everything = torch.ones(layout.prunable, dtype=torch.bool)
    masks = [
        free(layout, seconds_fixed=fixed).best(torch.ones(layout.size), everything, squares_of(layout), 0)
        for fixed in (1e-5, 1e-3, 1e-1)
    ]
    counts = [int(mask.sum()) for mask in masks]
    assert 1 <= counts[0] < counts[1] < counts[2] < layout.prunable
    assert bool((masks[2] | ~masks[1]).all())


def test_costly_weights_need_more_gain():
    layout = Layout.of(tiny_module(), image_shape=(1, 6, 6))
    everything = torch.ones(layout.prunable, dtype=torch.bool)
    kept = [
        kept_per_layer(layout, free(layout, seconds_fixed=1e-3, seconds_per_flop=flop).best(
            torch.ones(layout.size), everything, squares_of(layout), 0))
        for flop in (0.0, 1e-5)
    ]  # fmt: skip
    assert kept[1][0] / kept[1][1] < kept[0][0] / kept[0][1]


def test_large_kept_weights_stay_whatever_their_gradient_and_pruned_ones_may_come_back(layout):
    method = method_of(layout, mask_interval=5, initial_sparsity=0.5, target_sparsity=0.5, candidates=0.4, halvings=0.0)
    mask = random_bools(layout.prunable)
    weights = random_vector(layout.size, 3)
    gains = torch.where(mask, 1e-6 * squares_of(layout), squares_of(layout))  # only pruned weights pull
    new = method.best(weights, mask, gains, 5)
    highest = num_kept(0.5, layout.prunable)
    assert int(new.sum()) == highest
    share = 0.6 * min(1, highest / int(mask.sum()))
    for slot in layout.prunable_slots:
        before, magnitudes = slot.of(mask), slot.of(weights).abs()
        stays = torch.where(before, magnitudes, -1).flatten().argsort(descending=True)[: int(share * int(before.sum()))]
        assert bool(slot.of(new).flatten()[stays].all())
    regrown = new & ~mask
    assert int(regrown.sum()) > 0.3 * highest
    assert gains[regrown].min() >= gains[~mask & ~new].max()


def test_share_that_may_go_is_halved_by_the_end(layout):
    method = method_of(layout, initial_sparsity=0.0, target_sparsity=0.0)
    mask, weights = torch.ones(layout.prunable, dtype=torch.bool), random_vector(layout.size)
    sizes = [27, 192]
    for t in (0, 10, 20):
        stays = method.unquestioned(weights, mask, layout.prunable, t)
        assert kept_per_layer(layout, stays) == [int((1 - 0.3 * 0.5 ** (t / 20)) * size) for size in sizes]


@PRESETS
@pytest.mark.parametrize("interval", [1, 2, 5, 50])
def test_mask_changes_at_the_end_of_every_interval_within_its_bounds(layout, preset, interval):
    method = method_of(layout, preset, mask_interval=interval)
    state = state_of(layout)
    for t in range(method.rounds):
        new = merge(method, state, squares_of(layout, t), t)
        count = int(new.mask.sum())
        if t % interval != (interval - 1 if preset == "repo" else 0):
            assert torch.equal(new.mask, state.mask)
        elif preset == "repo":
            assert count == num_kept(sparsity_at(t, 0.5, 0.9, method.rounds), layout.prunable)
        else:
            assert method.bounds(t)[0] <= count <= method.bounds(t)[1]
        state = new
    assert (int(state.mask.sum()) == num_kept(0.9, layout.prunable)) or preset == "repo"


@pytest.mark.parametrize("rounds", [1, 2, 5, 6, 10, 200])
@pytest.mark.parametrize("interval", [1, 3, 50])
def test_ceiling_falls_to_the_target_by_the_last_choice(layout, rounds, interval):
    method = method_of(layout, rounds=rounds, mask_interval=interval)
    bounds = [method.bounds(t) for t in range(0, rounds, interval)]
    highest = [high for _, high in bounds]
    target = num_kept(0.9, layout.prunable)
    assert {low for low, _ in bounds} == {target} == {highest[-1]}
    assert highest == sorted(highest, reverse=True)
    assert len(bounds) == 1 or highest[0] == num_kept(0.5, layout.prunable)


def test_ceiling_falls_linearly(layout):
    method = method_of(layout, rounds=41, mask_interval=1, ceiling_until=1.0)
    assert [method.bounds(t)[1] for t in range(41)] == [num_kept(0.5 + 0.01 * t, layout.prunable) for t in range(41)]


@PRESETS
def test_permuting_gradients_changes_the_mask(layout, preset):
    method = method_of(layout, preset, mask_interval=1)
    squares = squares_of(layout)
    order = torch.randperm(layout.prunable)
    masks = [merge(method, state_of(layout), scores, 0).mask for scores in (squares, squares, squares[order])]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_repo_keeps_the_largest_squared_gradients_whatever_their_time():
    layout = Layout.of(tiny_module(), image_shape=(1, 6, 6))
    squares = squares_of(layout)
    mask = merge(method_of(layout, "repo", mask_interval=1), state_of(layout), squares, 0).mask
    assert squares[mask].min() > squares[~mask].max()


@PRESETS
def test_squared_gradients_are_averaged_by_samples_in_float64(layout, preset):
    method = method_of(layout, preset, mask_interval=1)
    state, squares = state_of(layout), [squares_of(layout, n) for n in range(3)]
    weights = random_vector(layout.size, 9)
    replies = {}
    for client, (count, own) in enumerate(zip((10, 30, 60), squares, strict=True)):
        reply = reply_of(weights, count, state.buffers)
        replies[client] = replace(reply, extras={**reply.extras, "squared_gradients": own})
    mean = sum(share * own.double() for share, own in zip((0.1, 0.3, 0.6), squares, strict=True)).float()
    new = method.merge(state, replies, 0)
    assert torch.equal(new.mask, method.best(new.weights, state.mask, mean, 0))


@PRESETS
def test_one_clients_gradients_choose_in_round_0_if_asked_for_and_never_later(layout, preset):
    method = method_of(layout, preset, mask_interval=1, first_mask_by="client")
    state, weights = state_of(layout), random_vector(layout.size, 9)
    replies = {}
    for client in (7, 2, 4):
        reply = reply_of(weights, 10, state.buffers)
        replies[client] = replace(reply, extras={**reply.extras, "squared_gradients": squares_of(layout, client)})
    first = method.merge(state, replies, 0)
    assert torch.equal(first.mask, method.best(first.weights, state.mask, squares_of(layout, 2), 0))
    for t, by in ((0, "cohort"), (1, "client")):
        new = method_of(layout, preset, mask_interval=1, first_mask_by=by).merge(state, replies, t)
        mean = sum(squares_of(layout, client).double() for client in replies) / 3
        assert torch.equal(new.mask, method.best(new.weights, state.mask, mean.float(), t))
        assert not torch.equal(new.mask, method.best(new.weights, state.mask, squares_of(layout, 2), t))


def trained(method, model, state, t, memory=None):
    plan = method.plan(method.offer(state, t, 3), memory or {}, t)
    result = local_update(model, plan, tiny_data(), torch.arange(12), tiny_config(batch_size=5), t, 3)
    return result, *method.reply(result, memory or {}, t)


@PRESETS
def test_squared_gradients_since_the_last_choice_add_up_at_the_client_and_go_up_once(layout, model, preset):
    method = method_of(layout, preset, mask_interval=4, squares_since="choice")
    alone = method_of(layout, preset, mask_interval=1)
    state = replace(state_of(layout, random_bools(layout.prunable, 0.3)), buffers=torch.ones(6))
    choice = 7 if preset == "repo" else 8
    memory, total = {}, torch.zeros(layout.prunable)
    for t in (choice - 4, choice - 3, choice - 1, choice):  # the first of them belongs to the choice before
        _, reply, memory = trained(method, model, state, t, memory)
        _, own, _ = trained(alone, model, state, t)
        total = own.extras["squared_gradients"] + (total if t > choice - 3 else 0)
        assert ("squared_gradients" in reply.extras) == method.chooses_mask(t)
    torch.testing.assert_close(reply.extras["squared_gradients"], total)


@PRESETS
def test_squared_gradients_of_all_prunable_weights_go_up_when_a_mask_is_chosen_and_only_then(layout, model, preset):
    method = method_of(layout, preset, mask_interval=4)
    mask = random_bools(layout.prunable, 0.3)
    state = replace(state_of(layout, mask), buffers=torch.ones(6))
    _, reply, _ = trained(method, model, state, 1)
    assert "squared_gradients" not in reply.extras
    result, reply, _ = trained(method, model, state, 7 if preset == "repo" else 4)
    sent = reply.extras["squared_gradients"]
    total = result.squared_gradients / 3 if preset == "paper" else result.gradient.square()
    assert torch.equal(sent, total[: layout.prunable])
    assert sent[~mask].norm() > 0
    assert reply.values.numel() == int(mask.sum()) + layout.size - layout.prunable


def test_paper_adds_the_mean_increment_so_that_pruned_weights_keep_their_value(layout):
    mask = random_bools(layout.prunable)
    state = state_of(layout, mask)
    sent = layout.masked(state.weights, mask)
    increments = [layout.masked(random_vector(layout.size, seed), mask) for seed in (1, 2)]
    replies = {n: reply_of(sent + own, count, state.buffers) for n, (own, count) in
               enumerate(zip(increments, (30, 10), strict=True))}  # fmt: skip
    new = method_of(layout).merge(state, replies, 1)
    torch.testing.assert_close(new.weights, state.weights + 0.75 * increments[0] + 0.25 * increments[1])
    assert torch.equal(new.weights[: layout.prunable][~mask], state.weights[: layout.prunable][~mask])
    repo = method_of(layout, "repo").merge(state, replies, 1)
    assert torch.count_nonzero(repo.weights[: layout.prunable][~mask]) == 0


@PRESETS
def test_weights_regrow_in_a_real_run(train, preset):
    rounds = train(tiny_config(method="prunefl", preset=preset, rounds=4, mask_interval=1, lr=0.3))
    assert all(record.regrown > 0 for _, record in rounds[1:3])
    assert rounds[0][0].mask.float().mean() == pytest.approx(0.5, abs=1e-3)


def test_interrupted_run_resumes_to_the_same_bits(tmp_path):
    config = tiny_config(**{**FAST, "method": "prunefl", "mask_interval": 2, "rounds": 4})
    _, resumed = interrupted(config, tmp_path)
    assert same_history(run(config, progress=False), resumed)


@pytest.mark.parametrize(("preset", "rounds"), [("paper", 9), ("repo", 13)])
def test_prunefl_learns_digits_at_its_target_sparsity(preset, rounds):
    settings = {"width": 0.5, "local_epochs": 5, "batch_size": 8, "target_sparsity": 0.8, "mask_interval": 3}
    history = run(tiny_config(method="prunefl", preset=preset, rounds=rounds, **settings), progress=False)
    assert history.sparsity.iloc[-1] == pytest.approx(0.8, abs=1e-4 if preset == "paper" else 0.03)
    assert history.accuracy.iloc[-1] > 0.6
