"""Laws of FedDP and FedDIP: when and how masks change, what each preset means, the penalty, masked uploads."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import random_bools, random_vector, reply_of, state_of, tiny_config, tiny_data

from feddip_lite.core.flat import Layout
from feddip_lite.core.models import empty_model
from feddip_lite.core.plan import LocalPlan, LocalResult
from feddip_lite.core.schedules import penalty_at, published_penalty_at, sparsity_at
from feddip_lite.core.sparsity import erk_densities, num_kept, topk_mask
from feddip_lite.core.terms import NormTerm, SquareTerm
from feddip_lite.methods.feddip import FedDIP, FedDP
from feddip_lite.train.client import local_update

PRESETS = pytest.mark.parametrize("preset", ["paper", "repo", "memory"])


def method_of(layout, preset="paper", cls=FedDP, **changes):
    return cls(**{"layout": layout, "rounds": 20, "seed": 0, **cls.presets[preset], **changes})


def merge(method, state, *vectors):
    replies = {client: reply_of(vector, 1, state.buffers) for client, vector in enumerate(vectors)}
    return method.merge(state, replies, state.round)


@PRESETS
@pytest.mark.parametrize("interval", [1, 2, 5])
def test_mask_changes_at_the_end_of_every_interval_and_keeps_the_exact_count(layout, preset, interval):
    method = method_of(layout, preset, mask_interval=interval)
    state = state_of(layout, method.start()[0])
    for t in range(method.rounds):
        new = merge(method, state, random_vector(layout.size, t))
        if t % interval == 0:
            sparsity = sparsity_at(t, 0.5, 0.9, method.rounds)
            assert int(new.mask.sum()) == layout.prunable - round(sparsity * layout.prunable)
        else:
            assert torch.equal(new.mask, state.mask)
        state = new


RESNET = {"model": "resnet18", "width": 0.05, "clients_per_round": 2, "rounds": 1, "local_epochs": 1}


def test_published_batchnorm_options_change_statistics_and_no_weight(train):
    usual, *others = (
        train(tiny_config(**RESNET, method_options=options))[0][0]
        for options in ({}, {"bn_statistics": "dense"}, {"test_leak": True})
    )
    for other in others:
        assert torch.equal(usual.weights, other.weights)
        assert not torch.equal(usual.buffers, other.buffers)


def test_pruned_shortcuts_join_the_prunable_weights_and_nothing_else_changes_size(federation):
    dense, _, _ = federation(tiny_config(**RESNET))
    pruned, _, method = federation(tiny_config(**RESNET, method_options={"shortcuts": "pruned"}))
    added = {slot.name: slot.stop - slot.start for slot in method.layout.prunable_slots if "shortcut" in slot.name}
    assert len(added) == 3
    assert len(pruned.mask) == len(dense.mask) + sum(added.values())
    assert len(pruned.weights) == len(dense.weights)


@PRESETS
@pytest.mark.parametrize("method", ["feddp", "feddip"])
def test_sparsity_column_is_the_share_that_the_mask_update_left(train, method, preset):
    rounds = train(tiny_config(method=method, preset=preset, rounds=5, mask_interval=2))
    prunable = len(rounds[0][0].mask)
    chosen = [0, 0, 2, 2, 4]  # the round of the last update
    kept = [num_kept(sparsity_at(t, 0.5, 0.9, 5), prunable) for t in chosen]
    assert [record.sparsity for _, record in rounds] == [1 - k / prunable for k in kept]


def test_mask_keeps_the_largest_magnitudes_of_the_average_over_all_layers_together(layout):
    method = method_of(layout, initial_sparsity=0.9)
    dense = random_vector(layout.size, 3)
    dense[:27] *= 1e-3  # one threshold for all layers: the small one is pruned to nothing
    new = merge(method, state_of(layout), dense)
    magnitudes = dense[: layout.prunable].abs()
    assert magnitudes[new.mask].min() > magnitudes[~new.mask].max()
    assert not bool(new.mask[:27].any())


@PRESETS
def test_permuting_magnitudes_permutes_the_mask(layout, preset):
    method = method_of(layout, preset)
    state = replace(state_of(layout), weights=torch.zeros(layout.size))
    dense = random_vector(layout.size, 3)
    order = torch.randperm(layout.prunable)
    shuffled = torch.cat([dense[: layout.prunable][order], dense[layout.prunable :]])
    mask, other = merge(method, state, dense).mask, merge(method, state, shuffled).mask
    assert torch.equal(other, mask[order])
    assert not torch.equal(other, mask)


def test_pruned_weight_returns_under_paper_when_its_average_is_large_and_never_under_repo(layout):
    mask = random_bools(layout.prunable)
    pruned = int((~mask).nonzero()[0])
    dense = random_vector(layout.size, 3)
    dense[pruned] = 100.0
    state = state_of(layout, mask, t=5)
    assert bool(merge(method_of(layout, "paper"), state, dense).mask[pruned])
    assert not bool(merge(method_of(layout, "repo"), state, dense).mask[pruned])


def test_masks_are_nested_under_repo(train):
    rounds = train(tiny_config(preset="repo", rounds=6, mask_interval=1))
    masks = [state.mask for state, _ in rounds]
    assert all(not bool((new & ~old).any()) for old, new in zip(masks, masks[1:], strict=False))
    assert [record.regrown for _, record in rounds] == [0] * 6
    assert len({int(mask.sum()) for mask in masks}) == 6


def test_weights_regrow_under_paper_in_a_real_run(train):
    enough = {"local_epochs": 8, "batch_size": 16, "width": 0.5}
    rounds = train(tiny_config(rounds=4, mask_interval=1, target_sparsity=0.5, **enough))
    assert sum(record.regrown for _, record in rounds[1:]) > 0


# Server memory (D9)


def test_server_memory_adds_what_clients_changed_to_the_dense_weights(layout):
    method = method_of(layout, "memory")
    mask = random_bools(layout.prunable)
    state = state_of(layout, mask, t=1)
    clients = [random_vector(layout.size, seed) for seed in (1, 2)]
    replies = {0: reply_of(clients[0], 30, state.buffers), 1: reply_of(clients[1], 10, state.buffers)}
    new = method.merge(state, replies, 1)
    sent = layout.masked(state.weights, mask)
    expected = state.weights + 0.75 * (clients[0] - sent) + 0.25 * (clients[1] - sent)
    torch.testing.assert_close(new.weights, expected)


def test_server_memory_keeps_pruned_weights_that_clients_leave_alone(layout):
    mask = random_bools(layout.prunable)
    state = state_of(layout, mask, t=1)
    unchanged = layout.masked(state.weights, mask)
    assert torch.equal(merge(method_of(layout, "memory"), state, unchanged).weights, state.weights)
    assert torch.equal(merge(method_of(layout, "paper"), state, unchanged).weights, unchanged)


def test_weight_that_only_the_server_remembers_returns_under_memory(layout):
    mask = random_bools(layout.prunable)
    pruned = int((~mask).nonzero()[0])
    state = state_of(layout, mask, t=5)
    state.weights[pruned] = 100.0
    unchanged = layout.masked(state.weights, mask)
    assert bool(merge(method_of(layout, "memory"), state, unchanged).mask[pruned])
    assert not bool(merge(method_of(layout, "paper"), state, unchanged).mask[pruned])


# No feedback, and where a weight that returns begins


@PRESETS
@pytest.mark.parametrize("cls", [FedDP, FedDIP])
@pytest.mark.parametrize("t", [0, 10])
def test_without_feedback_pruned_weights_stay_and_kept_ones_move_as_with_it(layout, model, preset, cls, t):
    config, ends = tiny_config(local_epochs=2, batch_size=5, weight_decay=0.0), []
    state = state_of(layout, random_bools(layout.prunable) if t else None, t=t)
    for feedback in ("within_round", "none"):
        method = method_of(layout, preset, cls, feedback=feedback)
        plan = method.plan(method.offer(state, t, 1), {}, t)
        assert method.penalty(t) > 0 or t == 0 or cls is FedDP
        ends.append(local_update(model, plan, tiny_data(), torch.arange(20), config, t, 1).weights)
    kept = torch.cat([plan.mask, torch.ones(layout.size - layout.prunable, dtype=torch.bool)])
    assert torch.equal(ends[0][kept], ends[1][kept])
    assert torch.equal(ends[1][~kept], plan.weights[~kept])
    assert not torch.equal(ends[0][~kept], plan.weights[~kept])


def test_without_feedback_no_weight_returns_after_the_first_mask(train):
    rounds = train(tiny_config(rounds=6, mask_interval=1, method_options={"feedback": "none"}))
    assert [record.regrown for _, record in rounds[1:]] == [0] * 5


@pytest.mark.parametrize("reentry", ["memory", "clipped", "zero"])
def test_returning_weights_begin_where_reentry_says_and_all_else_is_the_same(layout, reentry):
    mask = random_bools(layout.prunable)
    state = state_of(layout, mask, t=5)
    usual, own = (
        merge(method_of(layout, "memory", reentry=each), state, layout.masked(state.weights, mask))
        for each in ("memory", reentry)
    )
    returned = usual.mask & ~mask
    assert int(returned.sum()) > 5 and torch.equal(own.mask, usual.mask)
    remembered, found = (each.weights[: layout.prunable] for each in (usual, own))
    limits = {"memory": math.inf, "clipped": remembered[usual.mask].abs().min().item(), "zero": 0.0}
    assert torch.equal(found[returned], remembered[returned].clamp(-limits[reentry], limits[reentry]))
    assert torch.equal(found[~returned], remembered[~returned])
    assert torch.equal(own.weights[layout.prunable :], usual.weights[layout.prunable :])


# The mask of round 0 (D7)


@PRESETS
def test_masks_of_round_0_are_each_clients_own_and_unknown_to_the_server(layout, preset):
    method = method_of(layout, preset)
    mask, memory = method.start()
    assert bool(mask.all())
    assert memory == {}
    state = state_of(layout, mask)
    plans = [method.plan(method.offer(state, 0, client), {}, 0) for client in (1, 2, 1)]
    assert torch.equal(plans[0].mask, plans[2].mask)
    assert not torch.equal(plans[0].mask, plans[1].mask)
    assert all(torch.equal(plan.weights, state.weights) for plan in plans)  # the broadcast itself is dense
    assert method.plan(method.offer(state, 1, 1), {}, 1).mask is None


def test_masks_of_round_0_have_erk_densities_and_are_a_function_of_seed_and_client(layout):
    slots = layout.prunable_slots
    densities = erk_densities([slot.shape for slot in slots], 0.5)
    sizes = [slot.stop - slot.start for slot in slots]
    counts = [round(d * n) for d, n in zip(densities, sizes, strict=True)]
    masks = []
    for seed, client in ((1, 3), (1, 3), (1, 4), (2, 3)):
        method = method_of(layout, seed=seed)
        masks.append(method.plan(method.offer(state_of(layout), 0, client), {}, 0).mask)
        assert [int(slot.of(masks[-1]).sum()) for slot in slots] == counts
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[3])


@PRESETS
def test_first_server_mask_is_the_magnitude_mask_of_dense_uploads(layout, preset):
    method = method_of(layout, preset)
    state = state_of(layout, method.start()[0])
    trained = random_vector(layout.size, 3)
    own_mask, losses = random_bools(layout.prunable), torch.zeros(1)
    result = LocalResult(trained, state.buffers, own_mask, 10, losses, losses.mean())
    reply, _ = method.reply(result, {}, 0)
    assert torch.equal(reply.values, trained)  # what the client's mask prunes goes up, too
    new = method.merge(state, {1: reply}, 0)
    kept = num_kept(0.5, layout.prunable)
    assert torch.equal(new.mask, topk_mask(new.weights[: layout.prunable].abs(), kept))


@pytest.mark.parametrize("width", [0.125, 0.25, 1.0])
def test_shortcuts_share_in_erk_and_come_out_dense(width):
    layout = Layout.of(empty_model("resnet18", None, classes=100, width=width, channels=3, size=32))
    over = {what: method_of(layout, erk_over=what).erk_mask(0) for what in ("weights", "prunable")}
    slots = [slot for slot in layout.slots if len(slot.shape) > 1]
    shortcuts = slots[layout.num_prunable :]
    assert [slot.name.split(".")[2] for slot in shortcuts] == ["shortcut"] * 3
    densities = erk_densities([slot.shape for slot in slots], 0.5)
    assert densities[layout.num_prunable :] == [1.0] * 3
    size = {"weights": sum(slot.stop - slot.start for slot in shortcuts), "prunable": 0}
    for what, mask in over.items():  # half of the weights counted are zero, and shortcuts have none of these zeros
        assert int((~mask).sum()) == pytest.approx(0.5 * (layout.prunable + size[what]), abs=len(slots))


def test_the_shortcuts_share_makes_the_last_layers_a_hundredth_sparser():
    layout = Layout.of(empty_model("resnet18", None, classes=100, width=1.0, channels=3, size=32))
    found = {}
    for what in ("weights", "prunable"):
        mask = method_of(layout, erk_over=what).erk_mask(0)
        last = [
            slot for slot in layout.prunable_slots if slot.name.startswith("blocks.7.") or slot.shape[:2] == (512, 256)
        ]
        found[what] = sorted({round(1 - slot.of(mask).double().mean().item(), 3) for slot in last})
    assert found == {"weights": [0.465, 0.644], "prunable": [0.454, 0.637]}


def test_shared_mask_of_round_0_is_a_function_of_the_seed_and_goes_out_with_the_first_download(layout):
    masks = [method_of(layout, seed=seed, erk="shared").start()[0] for seed in (1, 1, 2)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    method = method_of(layout, seed=1, erk="shared")
    plans = [method.plan(method.offer(state_of(layout, masks[0]), 0, client), {}, 0) for client in (1, 2)]
    assert all(torch.equal(plan.mask, masks[0]) for plan in plans)
    assert torch.equal(plans[0].weights, layout.masked(state_of(layout).weights, masks[0]))


def test_magnitude_mask_of_round_0_keeps_the_largest_initial_weights_and_goes_out_with_the_first_download(layout):
    method = method_of(layout, erk="magnitude", initial_sparsity=0.7)
    state = method.begin(state_of(layout))
    magnitudes = state.weights[: layout.prunable].abs()
    assert int(state.mask.sum()) == num_kept(0.7, layout.prunable)
    assert magnitudes[state.mask].min() > magnitudes[~state.mask].max()
    plan = method.plan(method.offer(state, 0, 1), {}, 0)
    assert torch.equal(plan.mask, state.mask)
    assert torch.equal(plan.weights, layout.masked(state.weights, state.mask))


def test_without_an_erk_mask_round_0_is_dense(layout):
    method = method_of(layout, erk="none")
    assert bool(method.start()[0].all())
    assert method.plan(method.offer(state_of(layout), 0, 1), {}, 0).mask is None


@pytest.mark.parametrize("preset", ["paper", "repo"])
def test_masked_upload_gives_the_same_sparse_models_and_masks_as_the_dense_with_fewer_bytes(federation, train, preset):
    settings = {"preset": preset, "rounds": 6, "mask_interval": 2, "method_options": {"upload": "dense"}}
    dense = train(tiny_config(**settings))
    masked = train(tiny_config(**{**settings, "method_options": {"upload": "masked"}}))
    layout = federation(tiny_config())[2].layout
    for (a, a_record), (b, b_record) in zip(dense, masked, strict=True):
        assert torch.equal(a.mask, b.mask)
        assert torch.equal(layout.masked(a.weights, a.mask), layout.masked(b.weights, b.mask))
        assert a_record.down_bytes == b_record.down_bytes
        packed = a_record.round > 0 and (preset == "repo" or a_record.round % 2 == 1)
        assert (b_record.up_bytes < a_record.up_bytes) == packed


@pytest.mark.parametrize("upload", ["masked", "screened"])
@pytest.mark.parametrize("options", [{}, {"mask_source": "masked_average"}])
def test_an_upload_of_less_than_all_is_refused_with_server_memory(layout, options, upload):
    with pytest.raises(ValueError, match=f"upload: '{upload}' is not valid with server_memory"):
        method_of(layout, upload=upload, server_memory=True, **options)


@pytest.mark.parametrize(
    ("term", "of_tensor"),
    [
        (NormTerm, lambda tensor: tensor.norm()),
        (SquareTerm, lambda tensor: tensor.square().sum() / 2),
    ],
)
def test_penalty_gradient_equals_autograd_of_the_sum_over_masked_tensors(layout, term, of_tensor):
    mask = random_bools(layout.prunable, 0.4)
    masked = layout.masked(random_vector(layout.size), mask).requires_grad_()
    (0.3 * sum(of_tensor(slot.of(masked)) for slot in layout.prunable_slots)).backward()
    gradient = random_vector(layout.size, seed=1)
    start = gradient.clone()
    term(layout, 0.3)(gradient, masked.detach(), masked.detach())
    torch.testing.assert_close(gradient - start, masked.grad, atol=1e-6, rtol=1e-5)
    assert torch.equal(gradient[layout.prunable :], start[layout.prunable :])
    assert torch.equal(gradient[: layout.prunable][~mask], start[: layout.prunable][~mask])


def test_penalty_gradient_of_a_tensor_pruned_to_nothing_is_zero_never_nan(layout):
    masked = random_vector(layout.size)
    masked[:27] = 0
    gradient = torch.zeros(layout.size)
    NormTerm(layout, 1.0)(gradient, masked, masked)
    assert torch.count_nonzero(gradient[:27]) == 0
    assert gradient.isfinite().all()
    assert gradient[27:219].norm().item() == pytest.approx(1, rel=1e-6)


def test_a_dead_layer_trains_on_without_nan(model, layout):
    mask = torch.ones(layout.prunable, dtype=torch.bool)
    mask[:27] = False
    plan = LocalPlan(0.1 * random_vector(layout.size), mask, torch.ones(6), NormTerm(layout, 1e-3))
    result = local_update(model, plan, tiny_data(), torch.arange(12), tiny_config(batch_size=5), 0, 0)
    assert result.weights.isfinite().all()
    assert math.isfinite(result.loss)


def test_a_constant_penalty_and_a_squared_norm_reach_the_clients(layout):
    state = state_of(layout, torch.ones(layout.prunable, dtype=torch.bool), t=0)
    method = method_of(layout, cls=FedDIP, penalty_max=0.5, lambda_schedule="constant", norm="squared")
    plan = method.plan(method.offer(state, 0, 0), {}, 0)
    gradient = torch.zeros(layout.size)
    plan.add_gradient_(gradient, plan.weights, plan.weights)
    assert torch.equal(gradient[: layout.prunable], 0.5 * plan.weights[: layout.prunable])
    assert [method.penalty(t) for t in range(50)] == [0.5] * 50


@pytest.mark.parametrize(("preset", "schedule"), [("paper", penalty_at), ("repo", published_penalty_at)])
def test_penalty_follows_its_presets_schedule(layout, preset, schedule):
    method = method_of(layout, preset, FedDIP, rounds=50)
    assert [method.penalty(t) for t in range(50)] == [schedule(t, 1e-3, 20, 50) for t in range(50)]
    assert [method_of(layout, preset).penalty(t) for t in range(50)] == [0.0] * 50


def test_penalty_of_the_round_is_what_the_client_adds(layout):
    method = method_of(layout, cls=FedDIP, penalty_max=0.8, penalty_steps=4)
    state = state_of(layout, method.start()[0], t=10)
    plan = method.plan(method.offer(state, 10, 0), {}, 10)
    gradient, expected = torch.zeros(layout.size), torch.zeros(layout.size)
    plan.add_gradient_(gradient, plan.weights, plan.weights)
    NormTerm(layout, 0.4)(expected, plan.weights, plan.weights)
    assert torch.equal(gradient, expected)
    assert method.plan(method.offer(state, 0, 0), {}, 0).add_gradient_ is None


def test_feddip_equals_feddp_until_its_penalty_starts(train):
    with_penalty = train(tiny_config(method="feddip", penalty_steps=3))
    without = train(tiny_config(method="feddp"))
    equal = [torch.equal(a.weights, b.weights) for (a, _), (b, _) in zip(with_penalty, without, strict=True)]
    assert equal == [True, False, False]
    assert [record.penalty for _, record in with_penalty] == [penalty_at(t, 1e-3, 3, 3) for t in range(3)]
