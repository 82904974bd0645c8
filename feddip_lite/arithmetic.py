"""Forward and backward of one batch: what `local_update` asks of a model, and who computes it fastest here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .operators import stores_gradients

if TYPE_CHECKING:
    from .captured import Captured
    from .layout import FlatModel
    from .lenet import BlockLeNet5


class Autograd:
    """The readable way, for every module.

    Args:
        module: its parameters' gradients are views of `gradient` (n,).
        precision: "bf16" runs forward and backward under autocast; anything else in the parameters' own dtype.
    """

    def __init__(self, module: nn.Module, gradient: Tensor, precision: str = "float32"):
        self.module, self.gradient, self.precision = module, gradient, precision
        with self._autocast():
            stored = [list(layer.parameters()) for layer in module.modules() if stores_gradients(layer)]
        overwritten = {id(parameter) for parameters in stored for parameter in parameters}
        self.added_to = [p.grad for p in module.parameters() if id(p) not in overwritten]

    def loss_and_gradient(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy, a scalar; its gradient at the module's weights overwrites `gradient`."""
        torch._foreach_zero_(self.added_to)
        with self._autocast():
            loss = F.cross_entropy(self.module(images), labels)
        loss.backward()
        return loss.detach()

    def logits(self, images: Tensor) -> Tensor:
        """The module's output, in its present mode."""
        return self.module(images)

    def _autocast(self):
        return torch.autocast(self.gradient.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def fastest_arithmetic(model: FlatModel, size: int, precision: str) -> Autograd | BlockLeNet5 | Captured:
    """What computes the loss and gradient of `model` fastest where it lives, for images of `size` pixels a side."""
    from .captured import Captured, record_cuda_graph
    from .lenet import BlockLeNet5

    if model.weights.is_cuda:
        return Captured(model, precision, record_cuda_graph)
    if precision == "float32" and BlockLeNet5.fits(model, size):
        return BlockLeNet5(model)
    return Autograd(model.module, model.gradient, precision)
