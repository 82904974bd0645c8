"""Laws of FedMap: geometric pruning, nested masks, the target met exactly."""

import pytest
import torch
from conftest import LEARNING, random_vector, reply_of, state_of, tiny_config

from feddip_lite import run
from feddip_lite.core.sparsity import num_kept
from feddip_lite.methods.fedmap import FedMap


def method_of(layout, **changes):
    return FedMap(**{"layout": layout, "rounds": 20, "seed": 0, **changes})


def histories(method):
    """The states after each round, with random replies."""
    state = state_of(method.layout)
    for t in range(method.rounds):
        dense = method.layout.masked(random_vector(method.layout.size, t), state.mask)
        state = method.merge(state, {0: reply_of(dense, 1, state.buffers)}, t)
        yield state


@pytest.mark.parametrize("target", [0.0, 0.5, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("interval", [1, 2, 5, 7])
@pytest.mark.parametrize("rounds", [1, 2, 5, 6, 13, 20])
def test_last_event_meets_the_target_exactly_for_any_number_of_rounds(layout, rounds, interval, target):
    method = method_of(layout, rounds=rounds, mask_interval=interval, target_sparsity=target)
    last = list(histories(method))[-1]
    assert int(last.mask.sum()) == num_kept(target, layout.prunable)


@pytest.mark.parametrize("interval", [1, 3, 5])
def test_every_event_removes_the_same_share_of_what_is_left(layout, interval):
    method = method_of(layout, mask_interval=interval)
    densities = [1 - method.sparsity(t) for t in range(0, method.rounds, interval)]
    rate = densities[0]
    assert densities == pytest.approx([rate ** (event + 1) for event in range(len(densities))])
    assert densities[-1] == pytest.approx(0.1)


def test_mask_changes_at_the_end_of_every_interval_only_and_keeps_the_exact_count(layout):
    method = method_of(layout)
    previous = torch.ones(layout.prunable, dtype=torch.bool)
    for t, state in enumerate(histories(method)):
        assert int(state.mask.sum()) == num_kept(method.sparsity(t), layout.prunable)
        assert torch.equal(state.mask, previous) == (t % 5 != 0)
        previous = state.mask


def test_masks_are_nested(layout):
    masks = [state.mask for state in histories(method_of(layout, mask_interval=1))]
    assert all(not bool((new & ~old).any()) for old, new in zip(masks, masks[1:], strict=False))


def test_mask_keeps_the_largest_magnitudes_of_the_average_over_all_layers(layout):
    method = method_of(layout, rounds=1)
    dense = random_vector(layout.size, 3)
    magnitudes = dense[: layout.prunable].abs()
    mask = method.merge(state_of(layout), {0: reply_of(dense, 1, torch.zeros(6))}, 0).mask
    assert magnitudes[mask].min() > magnitudes[~mask].max()
    order = torch.randperm(layout.prunable)
    shuffled = torch.cat([dense[: layout.prunable][order], dense[layout.prunable :]])
    other = method.merge(state_of(layout), {0: reply_of(shuffled, 1, torch.zeros(6))}, 0).mask
    assert torch.equal(other, mask[order])
    assert not torch.equal(other, mask)


def test_fedmap_learns_the_digits_at_its_target_sparsity():
    last = run(tiny_config(**LEARNING, method="fedmap", target_sparsity=0.8), progress=False).iloc[-1]
    assert last.accuracy > 0.6
    assert last.sparsity == pytest.approx(0.8, abs=1e-3)
