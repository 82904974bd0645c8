"""What a method asks of a client (`LocalPlan`) and what training leaves (`LocalResult`). Next: `train/client.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import Diverged
from .flat import FlatModel


@dataclass(frozen=True)
class LocalPlan:
    """How one client trains in one round; made by `Method.plan` from what the client holds.

    Attributes:
        weights: (n,) float32, where training starts.
        mask: (P,) bool, or None for a dense model. Gradients are taken at w * mask.
        buffers: BatchNorm statistics to start from, (b,) float32.
        add_gradient_: called as `add_gradient_(gradient, masked, dense)`, all (n,); adds the gradient of a penalty or
            a proximal term to the first argument in place.
        project: apply the mask to w after every step (masked SGD), which removes error feedback.
        epochs: passes over the client's data; None = the configuration's `local_epochs`, 0 = no training.
        mode: "train"; "refresh" = forward passes that change nothing but BatchNorm statistics; "score" = forward
            passes in evaluation mode that change nothing: they only measure the loss.
        squared_gradients: sum the squared gradients of all steps.
        final_gradient: "batch" or "epoch": after training, take the gradient at w * mask over one more batch, or
            one more pass, of the client's data.
        then: makes a second plan from this one's result: prune, then go on. It starts where that plan says.
        dense_statistics: BatchNorm's statistics come from a second forward pass per batch, of the dense w (D12).
        test_leak: after training, BatchNorm also sees the client's test images (D13).
        model: trained in place of the worker's own, for clients whose model differs from the server's.
    """

    weights: Tensor
    mask: Tensor | None = None
    buffers: Tensor | None = None
    add_gradient_: Callable[[Tensor, Tensor, Tensor], None] | None = None
    project: bool = False
    epochs: int | None = None
    mode: str = "train"
    squared_gradients: bool = False
    final_gradient: str | None = None
    then: Callable[[LocalResult], LocalPlan] | None = None
    dense_statistics: bool = False
    test_leak: bool = False
    model: FlatModel | None = None

    def passes(self, usual: int) -> int:
        """Passes over the client's data, where `usual` are the configuration's `local_epochs`."""
        return usual if self.epochs is None else self.epochs


@dataclass(frozen=True)
class LocalResult:
    """What training left; everything stays on the device, nothing is waited for.

    Attributes:
        weights: (n,) float32, dense; `buffers`: BatchNorm statistics (b,); `mask`: the plan's.
        samples: number of training samples.
        losses: (steps,) float32, masked cross-entropy of each step, without penalty.
        loss: () float64, their mean over samples. Without training, of the final gradient's batches.
        squared_gradients: (n,) float32, if the plan asked for them.
        gradient: (n,) float32, the plan's `final_gradient`: a mean over samples, without penalty.
        parts: of a plan with `then`, what each of its plans left, in order.
        client: who trained, for draws addressed by client.
    """

    weights: Tensor
    buffers: Tensor
    mask: Tensor | None
    samples: int
    losses: Tensor
    loss: Tensor
    squared_gradients: Tensor | None = None
    gradient: Tensor | None = None
    parts: tuple[LocalResult, ...] = ()
    client: int = 0

    def check(self) -> None:
        """Wait for the device and raise `Diverged` if a loss or a weight is NaN or infinite."""
        each = self.losses.cpu()
        finite = each[each.isfinite()]
        if len(finite) < len(each) or not self.weights.isfinite().all():
            last = f"{finite[-1]:.4g}" if len(finite) else "none in this round"
            raise Diverged(f"training diverged in step {len(finite) + 1} of {len(each)}; last finite loss: {last}")

    def followed_by(self, after: LocalResult) -> LocalResult:
        """What both plans of a chain left: weights and mask of the second, losses of both, the first one's mean."""
        parts = (self, *(after.parts or [after]))
        return replace(after, losses=torch.cat([self.losses, after.losses]), loss=self.loss, parts=parts)
