"""Laws of the sparse primitives: ERK densities, random masks, exact top-k, measured sparsity and overlap."""

from math import prod

import pytest
import torch
from conftest import random_bools, random_vector
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from feddip_lite.core.flat import Layout
from feddip_lite.core.models import build_model
from feddip_lite.core.sparsity import (
    density,
    erk_densities,
    jaccard,
    kept_per_layer,
    layerwise_mask,
    nested_mask,
    num_kept,
    random_mask,
    tie_broken,
    topk_mask,
)

LENET = [(6, 1, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (10, 84)]
SHAPES = st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=4).map(tuple), min_size=1, max_size=6)


def layer_sparsities(shapes, density):
    return [round(1 - d, 3) for d in erk_densities(shapes, density)]


@given(shapes=SHAPES, density=st.floats(1e-3, 1))
@settings(deadline=None)
def test_erk_preserves_total_connections_with_densities_in_range(shapes, density):
    densities = erk_densities(shapes, density)
    sizes = [prod(shape) for shape in shapes]
    assert len(densities) == len(shapes)
    assert all(0 < d <= 1 for d in densities)
    assert sum(d * n for d, n in zip(densities, sizes, strict=True)) == pytest.approx(density * sum(sizes), rel=1e-9)


@given(shapes=SHAPES, density=st.floats(1e-3, 1))
@settings(deadline=None)
def test_erk_saturated_layers_become_dense_and_the_others_share_one_scale(shapes, density):
    densities = erk_densities(shapes, density)
    ratio = [d * prod(shape) / sum(shape) for d, shape in zip(densities, shapes, strict=True)]
    scales = [r for r, d in zip(ratio, densities, strict=True) if d < 1]
    assert scales == pytest.approx([scales[0]] * len(scales) if scales else [], rel=1e-9)
    # A dense layer is one that the common scale would push beyond 1.
    assert all(r <= min(scales, default=r) * (1 + 1e-9) for r, d in zip(ratio, densities, strict=True) if d == 1)


def test_erk_sparsities_of_lenet5_at_one_half():
    assert layer_sparsities(LENET, 0.5) == [0, 0.475, 0.574, 0.204, 0]


def test_erk_sparsities_of_alexnet_at_one_half():
    convolutions = [(64, 3, 3, 3), (192, 64, 3, 3), (384, 192, 3, 3), (256, 384, 3, 3), (256, 256, 3, 3)]
    assert layer_sparsities([*convolutions, (4096, 1024), (4096, 4096), (10, 4096)], 0.5) == [
        0, 0, 0.331, 0.443, 0.331, 0.070, 0.628, 0,
    ]  # fmt: skip


def test_erk_sparsities_of_resnet18_without_shortcuts_at_one_half():
    with torch.device("meta"):
        module = build_model("resnet18", classes=100, channels=3, size=32)
    slots = Layout.of(module).prunable_slots
    sparsities = dict(zip([slot.name for slot in slots], layer_sparsities([s.shape for s in slots], 0.5), strict=True))
    sparse = {name: value for name, value in sparsities.items() if value}
    # Only the last two stages are not dense; in each, the first convolution reads half the channels.
    assert sparse == {
        "blocks.4.conv2.weight": 0.269, "blocks.5.conv1.weight": 0.269, "blocks.5.conv2.weight": 0.269,
        "blocks.6.conv1.weight": 0.454,
        "blocks.6.conv2.weight": 0.637, "blocks.7.conv1.weight": 0.637, "blocks.7.conv2.weight": 0.637,
    }  # fmt: skip


def test_erk_at_density_one_is_dense():
    assert erk_densities(LENET, 1.0) == [1.0] * 5


@pytest.mark.parametrize("density", [0, -0.1, 1.0001, float("nan"), float("inf")])
def test_erk_rejects_density_out_of_range(density):
    with pytest.raises(ValueError, match=r"density: .* expected a number in \(0, 1\]"):
        erk_densities(LENET, density)


def test_erk_rejects_no_shapes():
    with pytest.raises(ValueError, match="shapes"):
        erk_densities([], 0.5)


def layout_of(*sizes: int) -> Layout:
    """Prunable tensors of these sizes."""
    return Layout.of(nn.Sequential(*(nn.Linear(size, 1, bias=False) for size in sizes)))


@pytest.mark.parametrize("densities", [(0.5, 0.25, 1.0), (0.0, 1.0, 0.333), (0.071, 0.9, 0.5)])
def test_random_mask_has_the_exact_count_in_every_layer(densities):
    sizes = (27, 192, 5)
    mask = random_mask(layout_of(*sizes), densities, torch.Generator().manual_seed(0))
    assert mask.dtype == torch.bool
    kept = [int(layer.sum()) for layer in mask.split(sizes)]
    assert kept == [round(d * n) for d, n in zip(densities, sizes, strict=True)]


def test_random_mask_is_a_function_of_its_generator_and_touches_no_other():
    layout, before = layout_of(300), torch.random.get_rng_state()
    masks = [random_mask(layout, [0.5], torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_random_mask_is_uniform_over_the_layer():
    layout = layout_of(10)
    counts = sum(random_mask(layout, [0.3], torch.Generator().manual_seed(seed)).int() for seed in range(2000))
    assert (counts - 600).abs().max() < 100  # five standard deviations of a binomial(2000, 0.3)


@given(st.lists(st.sampled_from([-2.0, -0.0, 0.0, 0.5, 1.0, 3.0, float("inf")]), min_size=1, max_size=30), st.data())
@settings(deadline=None)
def test_topk_mask_equals_a_stable_sort_with_ties_by_index(scores, data):
    keep = data.draw(st.integers(0, len(scores)))
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    expected = torch.zeros(len(scores), dtype=torch.bool)
    expected[order[:keep]] = True
    assert torch.equal(topk_mask(torch.tensor(scores), keep), expected)


@pytest.mark.parametrize("keep", [0, 1, 499, 500, 999, 1000])
@pytest.mark.parametrize("values", [1, 2, 7, 10**6])
def test_topk_mask_keeps_the_exact_count_with_ties(keep, values):
    scores = torch.randint(values, (1000,), generator=torch.Generator().manual_seed(0)).float()
    mask = topk_mask(scores, keep)
    assert int(mask.sum()) == keep
    assert keep in (0, 1000) or scores[mask].min() >= scores[~mask].max()


def test_topk_mask_leaves_its_scores_unchanged():
    scores = random_vector(50)
    before = scores.clone()
    topk_mask(scores, 20)
    assert torch.equal(scores, before)


def test_topk_mask_refuses_nan_and_says_how_many():
    with pytest.raises(ValueError, match="scores: 2 of 4 are NaN"):
        topk_mask(torch.tensor([1.0, float("nan"), 2.0, float("nan")]), 1)


@pytest.mark.parametrize("keep", [-1, 5])
def test_topk_mask_refuses_a_count_out_of_range(keep):
    with pytest.raises(ValueError, match=rf"keep: {keep} .* \[0, 4\]"):
        topk_mask(torch.zeros(4), keep)


@pytest.mark.parametrize("size", [1, 219, 61470])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.999])
def test_num_kept_removes_exactly_the_rounded_share(sparsity, size):
    assert num_kept(sparsity, size) == size - round(sparsity * size)


def test_density_is_the_share_that_is_not_exactly_zero():
    assert density(torch.tensor([0.0, -0.0, 1e-30, -3.0])) == 0.5
    assert density(torch.zeros(5)) == 0.0
    assert density(torch.ones(5)) == 1.0


def test_jaccard_is_intersection_over_union():
    a, b = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    assert jaccard(a, b) == 1 / 3
    assert jaccard(a, a) == 1.0
    assert jaccard(a, ~a) == 0.0
    assert jaccard(a & ~a, b & ~b) == 1.0


@given(keep=st.integers(0, 60), seed=st.integers(0, 99))
@settings(deadline=None)
def test_nested_mask_keeps_the_largest_scores_of_those_that_were_kept(keep, seed):
    mask, scores = random_bools(60, 0.5, seed), random_vector(60, seed).abs()
    scores[::7] = 0  # a score of zero still comes before what is pruned
    new = nested_mask(mask, scores, keep)
    assert int(new.sum()) == min(keep, int(mask.sum()))
    assert not bool((new & ~mask).any())
    if bool((mask & ~new).any()) and bool(new.any()):
        assert scores[new].min() >= scores[mask & ~new].max()


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30])
def test_tie_broken_orders_by_the_first_and_equal_ones_by_the_second(scale):
    first = torch.tensor([2, 0, 2, 1, 0, 1])
    second = scale * torch.tensor([0.1, 0.9, 0.3, 1.0, 0.2, 0.0])
    order = tie_broken(first, second).argsort(stable=True).tolist()
    pairs = list(zip(first.tolist(), second.tolist(), strict=True))
    assert order == sorted(range(6), key=lambda i: pairs[i])


@pytest.mark.parametrize("keep", [[0, 0, 0], [1, 2, 3], [5, 0, 7], [5, 9, 7]])
def test_layerwise_mask_keeps_the_largest_scores_of_each_layer_exactly_as_many_as_asked(keep):
    layout = Layout.of(nn.Sequential(*(nn.Linear(size, 1) for size in (5, 9, 7))))
    scores = random_vector(21)
    mask = layerwise_mask(layout, scores, keep)
    assert kept_per_layer(layout, mask) == keep
    for slot, count in zip(layout.prunable_slots, keep, strict=True):
        own = scores[slot.start : slot.stop]
        assert torch.equal(mask[slot.start : slot.stop], topk_mask(own, count))
