"""What is added to the gradient of the loss: penalties and proximal terms, as values that say what they are.

A plan's `add_gradient_` may be any function. Those here have names and numbers that can be read, so that whoever trains
several clients at once (`fast/`) can add the same terms to all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .flat import Layout


@dataclass(frozen=True, eq=False)
class NormTerm:
    """strength * w'_l / ||w'_l||_2 for every prunable tensor l, w' = w*m: the gradient of strength * sum ||w'_l||_2. A
    tensor pruned to nothing gets 0, never NaN."""

    layout: Layout
    strength: float

    def __call__(self, gradient: Tensor, masked: Tensor, dense: Tensor) -> None:
        for slot in self.layout.prunable_slots:
            weights = masked[slot.start : slot.stop]
            norm = torch.linalg.vector_norm(weights).clamp_min(torch.finfo(weights.dtype).tiny)
            gradient[slot.start : slot.stop].addcdiv_(weights, norm, value=self.strength)


@dataclass(frozen=True, eq=False)
class SquareTerm:
    """strength * w' on the prunable coordinates, w' = w*m: the gradient of strength / 2 * sum ||w'_l||_2^2."""

    layout: Layout
    strength: float

    def __call__(self, gradient: Tensor, masked: Tensor, dense: Tensor) -> None:
        prunable = self.layout.prunable
        gradient[:prunable].add_(masked[:prunable], alpha=self.strength)


@dataclass(frozen=True, eq=False)
class ProximalTerm:
    """The gradient of strength / 2 * ||w - centre||^2 of the dense w; `centre` is (n,)."""

    centre: Tensor
    strength: float

    def __call__(self, gradient: Tensor, masked: Tensor, dense: Tensor) -> None:
        gradient.add_(dense - self.centre, alpha=self.strength)


@dataclass(frozen=True, eq=False)
class WithoutPruned:
    """Not a sum: it leaves the gradient of what `mask` (P,) prunes out of the step. Such a weight only decays."""

    mask: Tensor

    def __call__(self, gradient: Tensor, masked: Tensor, dense: Tensor) -> None:
        gradient[: len(self.mask)].mul_(self.mask)


@dataclass(frozen=True, eq=False)
class Terms:
    """Several, one after the other."""

    parts: tuple

    def __call__(self, gradient: Tensor, masked: Tensor, dense: Tensor) -> None:
        for part in self.parts:
            part(gradient, masked, dense)
