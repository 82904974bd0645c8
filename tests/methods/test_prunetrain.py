"""Laws of PruneTrain: the group lasso, channels removed whole (`paper`), dense steps and regrowth (`repo`)."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import LEARNING, answers, random_bools, random_vector, reply_of, started, state_of, tiny_config

from feddip_lite import run
from feddip_lite.core.flat import Layout
from feddip_lite.core.models import build_model
from feddip_lite.core.schedules import sparsity_at
from feddip_lite.core.sparsity import num_kept
from feddip_lite.methods.prunetrain import PruneTrain

PRESETS = pytest.mark.parametrize("preset", ["paper", "repo"])


@pytest.fixture(scope="module")
def lenet():
    return Layout.of(build_model("lenet5", classes=10, channels=1, size=28))


def method_of(layout, preset="paper", **changes):
    return PruneTrain(**{"layout": layout, "rounds": 20, "seed": 0, **PruneTrain.presets[preset], **changes})


def merged(method, state, vector):
    return method.merge(state, {0: reply_of(vector, 1, state.buffers)}, state.round)


# Group lasso


@pytest.mark.parametrize("groups", ["outputs", "both", "tensors"])
def test_lasso_gradient_equals_autograd_of_the_sum_of_group_norms(lenet, groups):
    method = method_of(lenet, structured=groups != "tensors", input_groups=groups == "both")
    masked = lenet.masked(random_vector(lenet.size), random_bools(lenet.prunable, 0.4)).requires_grad_()
    tensors = [slot.of(masked) for slot in lenet.prunable_slots]
    if groups != "tensors":  # output channels and neurons; inputs in the last layer
        norms = [w.flatten(1).norm(dim=1).sum() for w in tensors[:-1]] + [tensors[-1].norm(dim=0).sum()]
        if groups == "both":  # inputs of all but the first layer
            norms += [w.transpose(0, 1).flatten(1).norm(dim=1).sum() for w in tensors[1:-1]]
    else:  # tensors, first and last left out
        norms = [w.norm() for w in tensors[1:-1]]
    (0.3 * sum(norms)).backward()
    gradient = random_vector(lenet.size, 1)
    start = gradient.clone()
    method.add_lasso_gradient_(gradient, masked.detach(), 0.3)
    torch.testing.assert_close(gradient - start, masked.grad, atol=1e-5, rtol=1e-4)


def test_lasso_gradient_of_a_group_pruned_to_nothing_is_zero_never_nan(layout):
    masked = random_vector(layout.size)
    masked[:9] = 0
    gradient = torch.zeros(layout.size)
    method_of(layout).add_lasso_gradient_(gradient, masked, 1.0)
    assert torch.count_nonzero(gradient[:9]) == 0
    assert gradient[9:18].norm().item() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("inputs", [False, True])
def test_penalty_is_the_stated_share_of_the_loss_before_training(lenet, inputs):
    module = build_model("lenet5", classes=10, channels=1, size=28)
    tensors = [dict(module.named_parameters())[slot.name].detach() for slot in lenet.prunable_slots]
    norms = sum(w.flatten(1).norm(dim=1).sum() for w in tensors[:-1]) + tensors[-1].norm(dim=0).sum()
    if inputs:
        norms += sum(w.transpose(0, 1).flatten(1).norm(dim=1).sum() for w in tensors[1:-1])
    for ratio in (0.0, 0.05, 0.5):
        strength = method_of(lenet, penalty_ratio=ratio, input_groups=inputs).penalty(0)
        assert strength * norms / (strength * norms + math.log(10)) == pytest.approx(ratio, rel=0.1)


@PRESETS
def test_penalty_is_constant_and_what_clients_add(layout, preset):
    method = method_of(layout, preset, strength=0.25)
    assert {method.penalty(t) for t in range(20)} == {0.25}
    plan = method.plan(method.offer(state_of(layout), 3, 0), {}, 3)
    gradient, expected = torch.zeros(layout.size), torch.zeros(layout.size)
    plan.add_gradient_(gradient, plan.weights, plan.weights)
    method.add_lasso_gradient_(expected, plan.weights, 0.25)
    assert torch.equal(gradient, expected)
    assert method_of(layout, preset).penalty(0) == (0.01 if preset == "repo" else method_of(layout).penalty(7))


def test_lasso_shrinks_the_groups(train):
    norms = []
    for strength in (0.0, 0.05):
        states = train(tiny_config(method="prunetrain", rounds=1, method_options={"strength": strength}))
        norms.append(states[0][0].weights[: len(states[0][0].mask)].norm())
    assert norms[1] < 0.95 * norms[0]


# How much


@pytest.mark.parametrize("target", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("interval", [1, 3, 5, 50])
@pytest.mark.parametrize("rounds", [1, 2, 5, 12])
def test_paper_meets_the_target_exactly_for_any_number_of_rounds(layout, rounds, interval, target):
    method = method_of(layout, rounds=rounds, mask_interval=interval, target_sparsity=target)
    state = state_of(layout)
    for t in range(rounds):
        new = merged(method, state, layout.masked(random_vector(layout.size, t), state.mask))
        assert not bool((new.mask & ~state.mask).any())
        if t % interval == 0:
            assert int(new.mask.sum()) == method.kept(t)
        else:
            assert torch.equal(new.mask, state.mask)
        state = new
    assert int(state.mask.sum()) == num_kept(target, layout.prunable)


def test_repo_prunes_to_the_exact_count_of_the_cubic_schedule_every_round(train):
    rounds = train(tiny_config(method="prunetrain", preset="repo", rounds=5))
    prunable = len(rounds[0][0].mask)
    expected = [num_kept(sparsity_at(t, 0.5, 0.9, 5), prunable) for t in range(5)]
    assert [int(state.mask.sum()) for state, _ in rounds] == expected


# paper: channels


def test_channels_go_whole_but_for_the_last_one(lenet):
    method = method_of(lenet, rounds=1, target_sparsity=0.7)
    mask = merged(method, state_of(lenet), random_vector(lenet.size, 2)).mask
    partly = []
    for slot in lenet.prunable_slots:
        share = method.groups(mask, slot).float().mean(1)
        partly += share[(share > 0) & (share < 1)].tolist()
    assert len(partly) <= 1
    assert int(mask.sum()) == num_kept(0.7, lenet.prunable)


def test_channels_kept_have_larger_root_mean_squares_than_channels_removed(lenet):
    method = method_of(lenet, rounds=1, target_sparsity=0.7)
    weights = random_vector(lenet.size, 2)
    mask = merged(method, state_of(lenet), weights).mask
    kept, removed = [], []
    for slot in lenet.prunable_slots:
        size, share = method.groups(weights, slot).square().mean(1), method.groups(mask, slot).float().mean(1)
        kept.append(size[share == 1])
        removed.append(size[(share == 0) & (size < size.max())])
    assert torch.cat(kept).min() > torch.cat(removed).max()


def test_channel_left_over_is_cut_by_magnitude(layout):
    method = method_of(layout, rounds=1, target_sparsity=1 - 200 / 219)  # 19 go: two channels of 9, and one weight
    weights = random_vector(layout.size, 1)
    weights[:18] *= 0.01
    weights[18:27] *= 10
    weights[27:219] *= 2
    weights[27:219].view(4, 48)[:, 5] = torch.tensor([0.4, 0.1, 0.3, 0.2])  # the weakest input of the last layer
    mask = merged(method, state_of(layout), weights).mask
    assert not bool(mask[:18].any())
    assert mask[27:219].view(4, 48)[:, 5].tolist() == [True, False, True, True]
    assert int(mask.sum()) == 200


def test_strongest_channel_of_every_layer_stays_however_weak_the_layer(lenet):
    method = method_of(lenet, rounds=1, target_sparsity=0.9)
    weights = random_vector(lenet.size, 2)
    weights[:150] *= 1e-6
    mask = merged(method, state_of(lenet), weights).mask
    for slot in lenet.prunable_slots:
        strongest = method.groups(weights, slot).square().mean(1).argmax()
        assert bool(method.groups(mask, slot)[strongest].all())
    assert int(mask[:150].sum()) == 25


def test_permuting_the_channels_permutes_the_mask(lenet):
    method = method_of(lenet, rounds=1, target_sparsity=0.7)
    slot = lenet.prunable_slots[2]
    weights = random_vector(lenet.size, 2)
    order = torch.randperm(slot.shape[0])
    shuffled = weights.clone()
    slot.of(shuffled)[:] = slot.of(weights)[order]
    mask, other = (merged(method, state_of(lenet), vector).mask for vector in (weights, shuffled))
    assert torch.equal(slot.of(other), slot.of(mask)[order])
    assert not torch.equal(other, mask)


def test_masks_are_nested_and_change_under_paper_in_a_real_run(train):
    states = [state for state, _ in train(tiny_config(method="prunetrain", rounds=5, mask_interval=1))]
    assert all(not bool((b.mask & ~a.mask).any()) for a, b in zip(states, states[1:], strict=False))
    assert len({int(state.mask.sum()) for state in states}) == 5


# repo: dense steps between two prunings


def test_repo_client_starts_pruned_over_all_layers_and_trains_densely(layout):
    method = method_of(layout, "repo")
    state = started(method, random_bools(layout.prunable, 0.9), 10)
    plan = method.plan(method.offer(state, 10, 0), {}, 10)
    started_with = plan.weights[: layout.prunable] != 0
    magnitudes = layout.masked(state.weights, state.mask)[: layout.prunable].abs()
    assert int(started_with.sum()) == method.kept(10)
    assert magnitudes[started_with].min() > magnitudes[~started_with].max()
    assert plan.mask is None
    assert not plan.project


def test_repo_client_replies_with_its_own_mask_of_the_exact_count(layout):
    method = method_of(layout, "repo")
    state = started(method, random_bools(layout.prunable, 0.5), 10)
    state = replace(state, weights=0.1 * state.weights)
    replies = answers(method, state, local_epochs=5)
    for reply in replies.values():
        assert int(reply.mask.sum()) == method.kept(10)
        assert reply.values.numel() == method.kept(10) + layout.size - layout.prunable
    masks = [reply.mask for reply in replies.values()]
    assert not all(torch.equal(mask, masks[0]) for mask in masks)


def test_repo_averages_with_zeros_counted_and_prunes_the_mean_by_magnitude(layout):
    method = method_of(layout, "repo")
    vectors, masks = (
        [random_vector(layout.size, s) for s in (1, 2)],
        [random_bools(layout.prunable, 0.3, s) for s in (1, 2)],
    )
    replies = {
        c: replace(reply_of(layout.pack(vectors[c], masks[c]), samples, torch.zeros(6)), mask=masks[c])
        for c, samples in enumerate((30, 10))
    }
    new = method.merge(state_of(layout, t=10), replies, 10)
    mean = 0.75 * layout.masked(vectors[0], masks[0]) + 0.25 * layout.masked(vectors[1], masks[1])
    torch.testing.assert_close(new.weights, mean)
    magnitudes = new.weights[: layout.prunable].abs()
    assert int(new.mask.sum()) == method.kept(10)
    assert magnitudes[new.mask].min() >= magnitudes[~new.mask].max()


def test_repo_spares_first_and_last_layer_while_they_are_less_than_half_of_what_is_kept(lenet):
    """LeNet-5 keeps 6147 at 0.9, of which conv1 and fc3 are 990; at 0.98 it keeps 1229, at 0.99 615."""
    ends = torch.zeros(lenet.prunable, dtype=torch.bool)
    ends[:150] = ends[-840:] = True
    weights = random_vector(lenet.size, 1)
    weights[: lenet.prunable][ends] *= 1e-3
    for target, spared in ((0.9, True), (0.98, False), (0.99, False)):
        method = method_of(lenet, "repo", initial_sparsity=target, target_sparsity=target)
        mask = merged(method, state_of(lenet), weights).mask
        assert int(mask.sum()) == num_kept(target, lenet.prunable)
        assert bool(mask[ends].all()) == spared
        assert bool(mask[ends].any()) == spared


def test_weights_regrow_under_repo_in_a_real_run(train):
    options = {"initial_sparsity": 0.5, "target_sparsity": 0.5}
    rounds = train(tiny_config(**{**LEARNING, "rounds": 4}, method="prunetrain", preset="repo", **options))
    assert sum(record.regrown for _, record in rounds[1:]) > 0


def test_repo_pruned_weight_returns_when_clients_grow_it(layout):
    method = method_of(layout, "repo")
    mask = random_bools(layout.prunable)
    pruned = int((~mask).nonzero()[0])
    dense = random_vector(layout.size, 3)
    dense[pruned] = 100.0
    full = torch.ones_like(mask)
    reply = replace(reply_of(dense, 1, torch.zeros(6)), mask=full)
    assert bool(method.merge(state_of(layout, mask, t=5), {0: reply}, 5).mask[pruned])


@PRESETS
def test_prunetrain_learns_the_digits_at_its_target_sparsity(preset):
    settings = {**LEARNING, "method": "prunetrain", "preset": preset, "target_sparsity": 0.8}
    last = run(tiny_config(**settings), progress=False).iloc[-1]
    assert last.accuracy > 0.6
    assert last.sparsity == pytest.approx(0.8, abs=0.01)
