"""Faster operators of the same functions: linear layers by oneDNN where PyTorch would take MKL.

MKL keeps to AVX2 on AMD processors, at half the speed of oneDNN. The operator is private to PyTorch and exists for
float32 on CPUs only; where it is missing, the ordinary one is used.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
WORTH_IT = 2**14  # weights; below, the call costs more than it saves (measured: benchmarks/NOTES.md)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """activation(x @ weight.T + bias) of x (b, i), weight (o, i), bias (o,); activation "none" or "relu"."""
    if _HAS_ONEDNN and weight.numel() >= WORTH_IT and x.device.type == "cpu" and x.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "")
    y = F.linear(x, weight, bias)
    return y.relu_() if activation == "relu" else y


def linear_gradients_(g: Tensor, x: Tensor, weight: Tensor, weight_gradient: Tensor, bias_gradient: Tensor) -> Tensor:
    """Write the gradients of a linear layer's weight (o, i) and bias (o,); returns that of its input, (b, i)."""
    torch.sum(g, 0, out=bias_gradient)
    weight_gradient.copy_(linear(g.t(), x.t(), None))
    return linear(g, weight.t(), None)
