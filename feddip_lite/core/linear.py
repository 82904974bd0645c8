"""Faster operators of the same functions: linear layers by oneDNN where PyTorch would take MKL.

MKL keeps to AVX2 on AMD processors, at half the speed of oneDNN. The operator is private to PyTorch and exists for
float32 on CPUs only; where it is missing, the ordinary one is used.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
WORTH_IT = 2**14  # weights; below, the call costs more than it saves (measured: benchmarks/NOTES.md)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """activation(x @ weight.T + bias) of x (b, i), weight (o, i), bias (o,); activation "none" or "relu"."""
    if _HAS_ONEDNN and weight.numel() >= WORTH_IT and x.device.type == "cpu" and x.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "")
    y = F.linear(x, weight, bias)
    return y.relu_() if activation == "relu" else y


class Linear(nn.Linear):
    """`nn.Linear`, by oneDNN where it helps. `bound` to a flat gradient (by `FlatModel`), it writes its own gradients
    there instead of adding to them, which spares a vector as long as its weight; elsewhere it is differentiable like
    any other."""

    bound = False

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return linear(x, self.weight, self.bias)
        if stores_gradients(self):
            return _StoringLinear.apply(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


def stores_gradients(layer: nn.Module) -> bool:
    """Whether the layer's backward overwrites its gradients: a bound `Linear` on a CPU, with the weights it was bound
    to (`functional_call` puts others in their place, which have no gradient)."""
    autocast = torch.is_autocast_enabled("cpu")
    stores = isinstance(layer, Linear) and layer.bound and layer.weight.grad is not None
    return stores and layer.weight.is_cpu and not autocast


class _StoringLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x)
        ctx.parameters = weight, bias
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx, g):
        weight, bias = ctx.parameters
        below = linear_gradients_(g.contiguous(), *ctx.saved_tensors, weight, weight.grad, bias.grad)
        return below, None, None


def linear_gradients_(g: Tensor, x: Tensor, weight: Tensor, weight_gradient: Tensor, bias_gradient: Tensor) -> Tensor:
    """Write the gradients of a linear layer's weight (o, i) and bias (o,); returns that of its input, (b, i)."""
    torch.sum(g, 0, out=bias_gradient)
    weight_gradient.copy_(linear(g.t(), x.t(), None))
    return linear(g, weight.t(), None)
