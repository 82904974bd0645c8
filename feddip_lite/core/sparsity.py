"""The primitives of sparse training, as functions of one-dimensional tensors: how many, which, and how alike.

*Sparsity* is the share of prunable weights that are zero, in [0, 1); *density* is 1 - sparsity. A mask is a bool
vector of length P, True = kept.
"""

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from .flat import Layout
from .settings import integer, real


def erk_densities(shapes: Sequence[tuple[int, ...]], density: float) -> list[float]:
    """Erdos-Renyi-kernel densities: thin layers denser, wide layers sparser, `density` overall.

    d_i = eps * sum(shape_i) / prod(shape_i); layers whose d_i would exceed 1 become dense and eps is solved again,
    so that sum(d_i n_i) = density * sum(n_i) and 0 < d_i <= 1.

    Args:
        shapes: shape of each prunable tensor.
        density: overall share of weights kept, in (0, 1].

    Raises:
        ValueError: no shapes, or a density outside (0, 1].

    Source: Evci et al. 2020 (RigL); published FedDIP code `client.py:calculate_sparsities`.
    """
    if not shapes:
        raise ValueError("shapes: empty; at least one prunable tensor is needed")
    real("(0, 1]").require("density", density)
    sizes = [prod(shape) for shape in shapes]
    saturated: set[int] = set()
    while len(saturated) < len(sizes):
        budget = density * sum(sizes) - sum(sizes[i] for i in saturated)
        others = [i for i in range(len(sizes)) if i not in saturated]
        scale = budget / sum(sum(shapes[i]) for i in others)
        over = {i for i in others if scale * sum(shapes[i]) > sizes[i] * (1 - 1e-12)}
        if not over:
            break
        saturated |= over
    return [1.0 if i in saturated else scale * sum(shape) / sizes[i] for i, shape in enumerate(shapes)]


def random_mask(layout: Layout, densities: Sequence[float], generator: torch.Generator) -> Tensor:
    """A uniformly random mask with exactly `round(density * size)` True in each prunable tensor.

    Args:
        densities: share kept of each tensor of `layout.prunable_slots`, in [0, 1].

    Returns:
        bool (P,) on the CPU; every draw comes from `generator`.
    """
    layers = []
    for slot, density in zip(layout.prunable_slots, densities, strict=True):
        size = slot.stop - slot.start
        layer = torch.zeros(size, dtype=torch.bool)
        layer[torch.randperm(size, generator=generator)[: round(density * size)]] = True
        layers.append(layer)
    return torch.cat(layers)


def topk_mask(scores: Tensor, keep: int) -> Tensor:
    """The mask of the `keep` largest scores: exactly `keep` True, ties broken by the lower index.

    Args:
        scores: (P,) real numbers.
        keep: number of True, in [0, P].

    Raises:
        ValueError: `keep` out of range, or a score is NaN.
    """
    integer(0, len(scores)).require("keep", keep)
    if scores.isnan().any():
        raise ValueError(f"scores: {int(scores.isnan().sum())} of {len(scores)} are NaN")
    if keep == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    place = len(scores) - keep  # of the smallest score that is kept, in ascending order
    if scores.device.type == "cpu":  # numpy finds it ten times faster than torch
        threshold = torch.from_numpy(np.partition(scores.numpy(), place))[place]
    else:
        threshold = scores.kthvalue(place + 1).values
    mask = scores > threshold
    ties = (scores == threshold).nonzero().squeeze(1)
    mask[ties[: keep - int(mask.count_nonzero())]] = True  # of bools far faster than sum()
    return mask


def nested_mask(mask: Tensor | None, scores: Tensor, keep: int) -> Tensor:
    """The mask of the `keep` largest scores among those that `mask` keeps; all of these where they are fewer.

    Args:
        mask: (P,) bool, None = all are kept; `scores`: (P,) >= 0.
    """
    if mask is None:
        return topk_mask(scores, keep)
    return topk_mask(scores.masked_fill(~mask, -1), keep) & mask


def tie_broken(first: Tensor, second: Tensor) -> Tensor:
    """Scores (P,) float64 that order by the integers `first`, and equal ones by the numbers `second` >= 0."""
    second = second.double()
    return first.double() + second / (2 * second.max()).clamp_min(torch.finfo(torch.float64).tiny)


def layerwise_mask(layout: Layout, scores: Tensor, keep: Sequence[int]) -> Tensor:
    """The mask (P,) of the `keep[l]` largest scores (P,) of each prunable tensor l: exactly that many in each."""
    slots = zip(layout.prunable_slots, keep, strict=True)
    return torch.cat([topk_mask(scores[slot.start : slot.stop], count) for slot, count in slots])


def kept_per_layer(layout: Layout, mask: Tensor) -> list[int]:
    """How many weights of each prunable tensor `mask` (P,) keeps."""
    return torch.stack([mask[slot.start : slot.stop].sum() for slot in layout.prunable_slots]).tolist()


def num_kept(sparsity: float, size: int) -> int:
    """How many of `size` weights a mask of this sparsity keeps: exactly `size - round(sparsity * size)`."""
    return size - round(sparsity * size)


def density(weights: Tensor) -> float:
    """Measured share of `weights` ((P,), a mask or any real dtype) that are not zero, in [0, 1]."""
    return int(torch.count_nonzero(weights)) / len(weights)


def jaccard(a: Tensor, b: Tensor) -> float:
    """|a and b| / |a or b| of two masks (P,), in [0, 1]; 1 when both are empty."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0
