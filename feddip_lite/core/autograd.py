"""Forward and backward of one batch: what `local_update` asks of a model."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .linear import stores_gradients


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
        trained = (p for p in module.parameters() if p.requires_grad)
        self.added_to = [p.grad for p in trained if id(p) not in overwritten]

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
