"""Laws of MPFL: stage one moves masks alone, the consensus is by votes, stage two trains on it from the start."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import LEARNING, answers, random_bools, started, state_of, tiny_config

from feddip_lite import run
from feddip_lite.core.flat import Layout
from feddip_lite.core.message import Message, num_bytes
from feddip_lite.core.models import build_model
from feddip_lite.core.sparsity import num_kept
from feddip_lite.methods.mpfl import MPFL


def method_of(layout, **changes):
    return MPFL(**{"layout": layout, "rounds": 20, "seed": 0, **changes})


def ballot(*kept, size=219):
    mask = torch.zeros(size, dtype=torch.bool)
    mask[list(kept)] = True
    return Message(None, mask, {"samples": torch.tensor([1]), "loss": torch.ones(1)})


@pytest.mark.parametrize("rounds", [1, 2, 3, 5, 10, 1000])
@pytest.mark.parametrize("mask_rounds", [1, 2, 10, 2000])
def test_both_stages_have_a_round_whenever_there_are_two(layout, rounds, mask_rounds):
    method = method_of(layout, rounds=rounds, mask_rounds=mask_rounds)
    assert 1 <= method.exchanges <= max(1, rounds - 1)
    assert method.exchanges == mask_rounds or mask_rounds >= rounds


def test_stage_one_leaves_the_weights_alone_rises_linearly_from_0_and_ends_exactly_at_the_target(train):
    rounds = train(tiny_config(method="mpfl", rounds=6, method_options={"mask_rounds": 4}))
    states = [state for state, _ in rounds]
    assert torch.equal(states[0].weights, states[3].weights)
    assert not torch.equal(states[3].weights, states[4].weights)
    prunable = len(states[0].mask)
    kept = [int(state.mask.sum()) for state in states]
    assert kept == [num_kept(sparsity, prunable) for sparsity in (0.0, 0.3, 0.6, 0.9, 0.9, 0.9)]
    masks = [state.mask for state in states]
    assert all(not bool((new & ~old).any()) for old, new in zip(masks, masks[1:], strict=False))


def test_stage_two_starts_from_the_initial_weights_on_the_consensus_mask(layout):
    method = method_of(layout, rounds=2)
    state = started(method, torch.ones(layout.prunable, dtype=torch.bool))
    agreed = method.merge(state, answers(method, state), 0)
    plan = method.plan(method.offer(agreed, 1, 0), {}, 1)
    assert torch.equal(plan.weights, layout.masked(state.weights, agreed.mask))
    assert plan.project


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1])
def test_upload_of_stage_one_is_one_bit_per_prunable_weight_and_a_header(layout, density):
    method = method_of(layout)
    state = started(method, random_bools(layout.prunable, density))
    for reply in answers(method, state).values():
        assert reply.values is None
        overhead = num_bytes(Message(None, None, reply.extras))
        assert num_bytes(reply) <= math.ceil(layout.prunable / 8) + overhead + 6  # kind byte, start of a stream


def test_upload_of_stage_one_is_the_clients_largest_magnitudes_within_the_current_mask(layout):
    method = method_of(layout)
    mask = random_bools(layout.prunable, 0.9)
    state = started(method, mask, t=4)
    trained = answers(replace(method, target_sparsity=0.0), state)  # keeps everything
    assert all(torch.equal(reply.mask, mask) for reply in trained.values())
    for reply in answers(method, state).values():
        assert not bool((reply.mask & ~mask).any())
        assert int(reply.mask.sum()) == num_kept(0.9 * 4 / 9, layout.prunable)


def test_clients_disagree_and_train_under_the_current_mask(layout):
    method = method_of(layout)
    replies = answers(method, started(method, random_bools(layout.prunable, 0.9), t=4), local_epochs=5)
    masks = [reply.mask for reply in replies.values()]
    assert not all(torch.equal(mask, masks[0]) for mask in masks)


def test_download_of_stage_one_is_the_initial_weights_packed_by_the_mask(layout):
    method = method_of(layout)
    state = state_of(layout, random_bools(layout.prunable))
    offer = method.offer(state, 0, 0)
    assert torch.equal(offer.mask, state.mask)
    assert torch.equal(offer.values, layout.pack(state.weights, state.mask))


def test_consensus_is_the_most_voted_with_ties_by_initial_magnitude(layout):
    method = method_of(layout, rounds=2, target_sparsity=1 - 4 / 219)
    state = state_of(layout)
    state.weights[:10] = torch.tensor([0.1, 9.0, 0.2, 0.5, -0.6, 0.3, 9.0, 0.0, 0.0, 0.0])
    replies = {0: ballot(0, 2, 3, 4), 1: ballot(0, 2, 4, 5), 2: ballot(0, 3, 5, 8)}
    # votes: 0 -> 3; 2, 3, 4, 5 -> 2 each, of which |w_0| drops 2; 8 -> 1; the large 1 and 6 -> none
    mask = method.merge(state, replies, 0).mask
    assert mask.nonzero().squeeze(1).tolist() == [0, 3, 4, 5]


def test_permuting_the_votes_changes_the_consensus(layout):
    method = method_of(layout, rounds=2, target_sparsity=0.5)
    state = replace(state_of(layout), weights=torch.ones(layout.size))
    masks = [random_bools(layout.prunable, 0.5, seed) for seed in range(5)]
    order = torch.randperm(layout.prunable)

    def consensus(masks):
        replies = {client: replace(ballot(), mask=mask) for client, mask in enumerate(masks)}
        return method.merge(state, replies, 0).mask

    mask, other = consensus(masks), consensus([mask[order] for mask in masks])
    votes = sum(mask.int() for mask in masks)
    assert votes[mask].min() >= votes[~mask].max()
    assert votes[order][other].min() >= votes[order][~other].max()
    assert not torch.equal(mask, other)


def test_weights_that_the_mask_dropped_do_not_return_whatever_clients_vote(layout):
    method = method_of(layout, rounds=2, target_sparsity=0.9)
    mask = random_bools(layout.prunable, 0.5)
    replies = {client: replace(ballot(), mask=~mask) for client in range(3)}
    assert not bool((method.merge(state_of(layout, mask), replies, 0).mask & ~mask).any())


@pytest.mark.parametrize(("model", "size", "percent"), [("lenet5", 28, 4), ("alexnet", 32, 10)])
def test_convolutions_are_too_small_a_part_to_reach_the_common_target_alone(model, size, percent):
    module = build_model(model, classes=10, width=1.0, channels=1 if size == 28 else 3, size=size)
    slots = Layout.of(module).prunable_slots
    kinds = {kind: sum(slot.stop - slot.start for slot in slots if len(slot.shape) == kind) for kind in (2, 4)}
    assert round(100 * kinds[4] / sum(kinds.values())) == percent


def test_mpfl_learns_the_digits_at_its_target_sparsity():
    last = run(tiny_config(**LEARNING, method="mpfl", target_sparsity=0.8), progress=False).iloc[-1]
    assert last.accuracy > 0.6
    assert last.sparsity == pytest.approx(0.8, abs=1e-3)
