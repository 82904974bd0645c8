"""Laws of FedTiny: candidates, their choice by what clients measure, and masks refined by top-k gradients."""

from dataclasses import replace

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
)
from torch import nn

from feddip_lite import run
from feddip_lite.core.flat import FlatModel, Layout
from feddip_lite.core.message import num_bytes
from feddip_lite.core.sparsity import erk_densities, kept_per_layer, num_kept
from feddip_lite.methods.feddst import replaceable
from feddip_lite.methods.fedtiny import FedTiny, mean_of_sparse
from feddip_lite.train.client import local_update


def method_of(layout, **changes):
    return FedTiny(**{"layout": layout, "rounds": 20, "seed": 0, "target_sparsity": 0.5, "mask_interval": 4, **changes})


def begun(method, seed=0):
    """The state before round 0."""
    state = state_of(method.layout, method.start()[0], seed)
    return method.begin(replace(state, buffers=torch.ones(method.layout.buffer_size)))


def settled(method, mask, t=1):
    """A state after the selection, with this mask."""
    return replace(state_of(method.layout, mask, t=t), buffers=torch.ones(method.layout.buffer_size))


def plain_model():
    """A model without BatchNorm for 6x6 images: n = 340, P = 320."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 4))
    return FlatModel(module, Layout.of(module))


def answer(method, model, state, t, samples=12, **changes):
    """(result, reply) of client 3 in round t."""
    plan = method.plan(method.offer(state, t, 3), {}, t)
    config = tiny_config(**{"batch_size": 5, **changes})
    result = local_update(model, plan, tiny_data(), torch.arange(samples), config, t, 3)
    return result, method.reply(result, {}, t)[0]


def candidates_of(state, count):
    return [state.memory["candidates"].bitwise_and(1 << number) > 0 for number in range(count)]


# Candidates


@pytest.mark.parametrize("target", [0.5, 0.9, 0.95])
def test_every_candidate_has_the_exact_target_sparsity_and_the_largest_magnitudes_of_each_layer(layout, target):
    method = method_of(layout, target_sparsity=target)
    state = begun(method)
    masks = candidates_of(state, 5)
    magnitudes = state.weights.abs()
    for mask in masks:
        assert int(mask.sum()) == num_kept(target, layout.prunable)
        for slot in layout.prunable_slots:
            kept, gone = slot.of(magnitudes)[slot.of(mask)], slot.of(magnitudes)[~slot.of(mask)]
            assert not len(kept) or not len(gone) or kept.min() > gone.max()
    assert torch.equal(state.mask, masks[0])


def test_candidates_differ_in_their_layers_densities_and_the_first_is_erk():
    model = plain_model()
    method = method_of(model.layout, target_sparsity=0.8, candidates=8)
    state = begun(method)
    counts = [kept_per_layer(model.layout, mask) for mask in candidates_of(state, 8)]
    slots = model.layout.prunable_slots
    densities = erk_densities([slot.shape for slot in slots], 0.2)
    erk = [d * (slot.stop - slot.start) for d, slot in zip(densities, slots, strict=True)]
    assert counts[0] == pytest.approx(erk, abs=1)
    assert len({tuple(count) for count in counts}) >= 6


def test_candidates_are_a_function_of_the_seed(layout):
    states = [begun(method_of(layout, seed=seed), seed=7) for seed in (1, 1, 2)]
    codes = [state.memory["candidates"] for state in states]
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


def test_a_single_candidate_needs_no_selection(layout, model):
    method = method_of(layout, candidates=1)
    state = begun(method)
    assert state.memory == {}
    _, reply = answer(method, model, state, 0)
    assert reply.values.numel() == int(state.mask.sum()) + layout.size - layout.prunable


# Module 1: the choice


def test_clients_hold_every_candidate_and_nothing_else(layout):
    method = method_of(layout, target_sparsity=0.9)
    state = begun(method)
    offer = method.offer(state, 0, 3)
    masks = candidates_of(state, 5)
    assert torch.equal(offer.mask, torch.stack(masks).any(0))
    assert offer.values.numel() == int(offer.mask.sum()) + layout.size - layout.prunable
    plan = method.plan(offer, {}, 0)
    for mask in masks:
        assert torch.equal(plan.mask, mask)
        kept = layout.masked(state.weights, mask)
        assert torch.equal(layout.masked(plan.weights, mask), kept)
        plan = plan.then(None) if plan.then else None
    assert plan is None


def test_round_0_refreshes_batchnorm_of_each_candidate_and_trains_nothing(layout, model):
    method = method_of(layout)
    state = begun(method)
    result, reply = answer(method, model, state, 0, local_epochs=2)
    assert reply.values is None
    each = reply.extras["statistics"].chunk(5)
    for own, part, mask in zip(each, result.parts, candidates_of(state, 5), strict=True):
        assert torch.equal(own, part.buffers)
        assert torch.equal(part.mask, mask)
        assert torch.equal(part.weights, layout.masked(state.weights, mask))
        assert not torch.equal(own, state.buffers)
    assert len({tuple(own.tolist()) for own in each}) > 1
    assert len(result.losses) == 5 * 2 * 3
    assert num_bytes(reply) < 4 * 5 * layout.buffer_size + 200


def test_round_0_averages_the_statistics_and_leaves_the_model_alone(layout):
    method = method_of(layout)
    state = begun(method)
    replies = {}
    for client, count in enumerate((10, 30)):
        reply = reply_of(None, count)
        replies[client] = replace(reply, extras={**reply.extras, "statistics": torch.full((30,), float(client))})
    new = method.merge(state, replies, 0)
    assert torch.equal(new.memory["statistics"], torch.full((30,), 0.75))
    assert torch.equal(new.weights, state.weights)
    assert torch.equal(new.mask, state.mask)
    assert new.round == 1


def test_round_1_measures_each_candidate_under_its_averaged_statistics(layout, model):
    method = method_of(layout)
    statistics = random_vector(30).abs() + 0.1
    state = begun(method)
    state = replace(state, round=1, memory={**state.memory, "statistics": statistics})
    result, reply = answer(method, model, state, 1)
    assert reply.values is None
    data = tiny_data()
    for number, mask in enumerate(candidates_of(state, 5)):
        model.load(state.weights, mask, statistics.chunk(5)[number])
        model.module.eval()
        with torch.no_grad():
            logits = model.module(data.train_images[:12] / 255.0)
        expected = nn.functional.cross_entropy(logits, data.train_labels[:12])
        assert float(reply.extras["losses"][number]) == pytest.approx(float(expected), rel=1e-5)
        assert torch.equal(result.parts[number].buffers, statistics.chunk(5)[number])


def voting(losses, samples):
    replies = {}
    for client, (row, count) in enumerate(zip(losses, samples, strict=True)):
        reply = reply_of(None, count)
        extras = {**reply.extras, "losses": torch.tensor(row, dtype=torch.float64)}
        replies[client] = replace(reply, extras=extras)
    return replies


@pytest.mark.parametrize("samples, best", [((10, 10, 10), 2), ((70, 10, 10), 4)])
def test_candidate_of_lowest_mean_loss_wins_with_its_statistics(layout, samples, best):
    method = method_of(layout)
    state = begun(method)
    masks = candidates_of(state, 5)
    state = replace(state, round=1, memory={**state.memory, "statistics": torch.arange(30.0)})
    losses = [[3.0, 3.0, 2.5, 3.0, 1.5], [3.0, 3.0, 1.0, 3.0, 2.5], [3.0, 3.0, 1.0, 3.0, 2.5]]
    new = method.merge(state, voting(losses, samples), 1)
    assert torch.equal(new.mask, masks[best])
    assert new.buffers.tolist() == list(range(6 * best, 6 * best + 6))
    assert new.memory == {}
    assert new.round == 2
    assert torch.equal(new.weights, state.weights)


def test_without_batchnorm_round_0_chooses_the_candidate_of_lowest_loss_and_round_1_trains():
    model = plain_model()
    method = method_of(model.layout, target_sparsity=0.9)
    state = begun(method)
    _, reply = answer(method, model, state, 0)
    assert reply.values is None
    losses = reply.extras["losses"]
    new = method.merge(state, {3: reply}, 0)
    assert torch.equal(new.mask, candidates_of(state, 5)[int(losses.argmin())])
    assert new.memory == {}
    _, reply = answer(method, model, new, 1)
    assert reply.values.numel() == num_kept(0.9, 320) + 12


# Module 2: refinement


def test_clients_send_the_largest_gradients_of_pruned_weights_and_where_they_are(layout, model):
    method = method_of(layout)
    mask = random_bools(layout.prunable)
    result, reply = answer(method, model, settled(method, mask), 4)
    counts = replaceable(layout, mask, method.share(4))
    assert all(counts)
    indices, gradients = reply.extras["indices"], reply.extras["gradients"]
    assert indices.dtype == torch.int32
    assert torch.equal(gradients, result.gradient[indices])
    sent = torch.zeros(layout.prunable, dtype=torch.bool)
    sent[indices] = True
    assert not bool((sent & mask).any())
    assert kept_per_layer(layout, sent) == counts
    for slot in layout.prunable_slots:
        size = slot.of(result.gradient).abs()
        assert size[slot.of(sent)].min() >= size[~slot.of(sent) & ~slot.of(mask)].max()


@pytest.mark.parametrize("t", [1, 2, 3, 5, 12, 16])
def test_no_gradients_travel_and_no_mask_changes_in_any_other_round(layout, model, t):
    method = method_of(layout)
    state = settled(method, random_bools(layout.prunable), t)
    result, reply = answer(method, model, state, t)
    assert result.gradient is None
    assert set(reply.extras) == {"samples", "loss", "buffers"}
    assert torch.equal(method.merge(state, {3: reply}, t).mask, state.mask)


def test_mean_of_sparse_vectors_counts_what_was_not_sent_as_0():
    sent = [
        {"indices": torch.tensor([4, 1], dtype=torch.int32), "gradients": torch.tensor([1.0, 2.0])},
        {"indices": torch.tensor([1], dtype=torch.int32), "gradients": torch.tensor([-2.0])},
    ]
    assert mean_of_sparse(sent, [30, 10], 6).tolist() == [0, 1.0, 0, 0, 0.75, 0]


def refined(layout, method, mask, weights, vectors, t=4):
    """The state after round t, in which clients send `weights` and all gradients `vectors` [(P,), ...]."""
    replies = {}
    for client, vector in enumerate(vectors):
        reply = reply_of(layout.masked(weights, mask), 10, torch.ones(layout.buffer_size))
        indices = (~mask).nonzero().squeeze(1)
        found = {"indices": indices.int(), "gradients": vector[indices]}
        replies[client] = replace(reply, extras={**reply.extras, **found})
    return method.merge(settled(method, mask, t), replies, t)


def test_server_drops_the_smallest_weights_and_grows_the_largest_mean_gradients_of_each_layer(layout):
    method = method_of(layout)
    mask, weights = random_bools(layout.prunable), random_vector(layout.size, 1)
    vectors = [random_vector(layout.prunable, seed) for seed in (2, 3, 4)]
    new = refined(layout, method, mask, weights, vectors)
    counts = replaceable(layout, mask, method.share(4))
    gradient = sum(vectors).abs()
    assert kept_per_layer(layout, new.mask) == kept_per_layer(layout, mask)
    for slot, count in zip(layout.prunable_slots, counts, strict=True):
        before, after = slot.of(mask), slot.of(new.mask)
        dropped, grown = before & ~after, after & ~before
        assert int(dropped.sum()) == int(grown.sum()) == count > 0
        assert slot.of(weights).abs()[dropped].max() <= slot.of(weights).abs()[before & after].min()
        assert slot.of(gradient)[grown].min() >= slot.of(gradient)[~before & ~after].max()
    assert torch.count_nonzero(new.weights[: layout.prunable][new.mask & ~mask]) == 0


def test_permuting_gradients_changes_what_grows(layout):
    method = method_of(layout)
    mask, weights, vector = random_bools(layout.prunable), random_vector(layout.size, 1), random_vector(219, 2)
    masks = [refined(layout, method, mask, weights, [v]).mask for v in (vector, vector, vector.flip(0))]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_masks_keep_the_exact_count_in_every_round_and_change_when_they_should(federation, train):
    options = {"replaced": 0.5, "replace_until": 0.7}
    config = tiny_config(method="fedtiny", rounds=8, mask_interval=2, method_options=options)
    rounds = train(config)
    for state, record in rounds:
        assert int(state.mask.sum()) == num_kept(0.9, len(state.mask))
        if record.round > 0:
            assert (record.regrown > 0) == (record.round in (2, 4))
    state, record = rounds[0]
    assert record.up_bytes < 3 * 200  # losses alone
    assert torch.equal(state.weights, federation(config)[0].weights)


def test_selection_with_batchnorm_takes_two_rounds_of_ordinary_cohorts(train):
    rounds = train(tiny_config(method="fedtiny", model="resnet18", width=0.02, rounds=3, **FAST))
    (first, _), (second, _), (third, record) = rounds
    assert "statistics" in first.memory
    assert second.memory == {}
    assert torch.equal(first.weights, second.weights)
    assert not torch.equal(first.buffers, second.buffers)
    assert not torch.equal(second.weights, third.weights)
    assert all(int(state.mask.sum()) == num_kept(0.9, len(state.mask)) for state, _ in rounds)


@pytest.mark.parametrize(("model", "width"), [("lenet5", 0.3), ("resnet18", 0.02)])
def test_interrupted_run_resumes_to_the_same_bits(tmp_path, model, width):
    settings = {"method": "fedtiny", "model": model, "width": width, "mask_interval": 1, "rounds": 4}
    config = tiny_config(**{**FAST, **settings})
    _, resumed = interrupted(config, tmp_path)
    assert same_history(run(config, progress=False), resumed)


def test_fedtiny_learns_digits_at_its_target_sparsity():
    settings = {"width": 0.5, "local_epochs": 5, "batch_size": 8, "target_sparsity": 0.8, "mask_interval": 3}
    history = run(tiny_config(method="fedtiny", rounds=11, **settings), progress=False)
    assert history.sparsity.iloc[-1] == pytest.approx(0.8, abs=2e-3)
    assert history.accuracy.iloc[-1] > 0.6
