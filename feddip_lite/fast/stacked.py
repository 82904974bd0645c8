"""A model with the weights of K clients at once: one call computes what K models compute, each for images of its own.

Images are (b, K * C, H, W): the clients' channels one after the other. BatchNorm and pooling take every channel by
itself anyway; a convolution is a product of its weights and all windows of the images, (K, b, c y x, H W), and a linear
layer one over (K, b, i).
The model's own `forward` runs unchanged, on these layers in place of its own. Used by `together.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.models import AlexNet, Dropout, LeNet5, ResNet18

KNOWN = (LeNet5, AlexNet, ResNet18)
"""Models whose `forward` is known to do nothing across channels outside its layers."""


@dataclass
class Padding:
    """Which samples of a batch count: `valid` (b, K), 1 or 0; None = all of them. `sizes` (K,): how many of each
    client. All floating, on the device."""

    valid: Tensor | None = None
    sizes: Tensor | None = None


def stacked(
    module: nn.Module, clients: int, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], padding: Padding
) -> nn.Module:
    """`module`, one of KNOWN, for K = `clients` at once, in training mode; `module` stays as it is.

    Args:
        weights: by name, leaves (K, *shape) that require gradients: the parameters.
        buffers: by name, BatchNorm's running means and variances, (K, channels), updated in place.
        padding: looked at in every forward pass.
    """

    def twin(layer: nn.Module, path: str) -> nn.Module:
        own = {name: weights[f"{path}{name}"] for name, _ in layer.named_parameters(recurse=False)}
        if isinstance(layer, nn.Conv2d):
            return _Conv(layer, clients, own)
        if isinstance(layer, nn.Linear):
            return _Linear(clients, own)
        if isinstance(layer, nn.BatchNorm2d):
            statistics = [buffers[f"{path}{name}"] for name in ("running_mean", "running_var")]
            return _BatchNorm(layer, clients, own, statistics, padding)
        if isinstance(layer, Dropout):
            return StackedDropout(layer, clients)
        ours = copy(layer)  # what holds other layers keeps its code and its names
        ours._modules = {name: twin(child, f"{path}{name}.") for name, child in layer.named_children()}
        return ours

    return twin(module, "").train()


class _Layer(nn.Module):
    """A layer of K clients; `weight` and `bias` are (K, *shape)."""

    def __init__(self, clients: int, own: Mapping[str, Tensor]):
        super().__init__()
        self.clients = clients
        self.weight, self.bias = own.get("weight"), own.get("bias")


class _Conv(_Layer):
    """For more than one client a product of weights and copied windows: cuDNN takes twice as long for one convolution
    in K groups (benchmarks/NOTES.md). No model of KNOWN has groups or dilation."""

    def __init__(self, layer: nn.Conv2d, clients: int, own: Mapping[str, Tensor]):
        super().__init__(clients, own)
        self.kernel, self.stride, self.padding = layer.kernel_size, layer.stride, layer.padding

    def forward(self, x: Tensor) -> Tensor:
        if self.clients == 1:
            bias = None if self.bias is None else self.bias[0]
            return F.conv2d(x, self.weight[0], bias, self.stride, self.padding)
        (kernel_y, kernel_x), (stride_y, stride_x), (pad_y, pad_x) = self.kernel, self.stride, self.padding
        x = F.pad(x, (pad_x, pad_x, pad_y, pad_y)).unflatten(1, (self.clients, -1))
        windows = x.unfold(3, kernel_y, stride_y).unfold(4, kernel_x, stride_x)  # (b, K, c, H, W, y, x)
        batch, _, _, height, width = windows.shape[:5]
        windows = windows.permute(1, 0, 2, 5, 6, 3, 4).reshape(self.clients, batch, -1, height * width)
        y = self.weight.flatten(2)[:, None] @ windows  # (K, b, o, H * W)
        if self.bias is not None:
            y = y + self.bias[:, None, :, None].to(y.dtype)
        return y.transpose(0, 1).reshape(batch, -1, height, width)


class _Linear(_Layer):
    """(K, b, i) or, straight from a convolution, (b, K * i) to (K, b, o)."""

    def forward(self, x: Tensor) -> Tensor:
        x = _apart(x, self.clients)
        if self.clients == 1:  # a product with its bias in one kernel
            return F.linear(x[0], self.weight[0], self.bias[0])[None]
        return torch.baddbmm(self.bias[:, None], x, self.weight.transpose(1, 2))


class _BatchNorm(_Layer):
    def __init__(self, layer: nn.BatchNorm2d, clients: int, own, statistics: list[Tensor], padding: Padding):
        super().__init__(clients, own)
        self.mean, self.variance = statistics
        self.momentum, self.eps, self.padding = layer.momentum, layer.eps, padding

    def forward(self, x: Tensor) -> Tensor:
        if self.padding.valid is None:
            channels = (each.flatten() for each in (self.mean, self.variance, self.weight, self.bias))
            return F.batch_norm(x, *channels, True, self.momentum, self.eps)
        return self._of_valid(x)

    def _of_valid(self, x: Tensor) -> Tensor:
        """The same over the samples that count. A client without any keeps its statistics. What it computes does not
        matter, but without a variance it would grow from layer to layer, beyond all numbers."""
        y = x.unflatten(1, (self.clients, -1)).to(self.weight.dtype)  # (b, K, c, h, w)
        active = self.padding.sizes > 0  # (K,)
        valid = torch.maximum(self.padding.valid, (~active).to(y.dtype))
        count = (valid.sum(0) * y.shape[3] * y.shape[4])[:, None]  # (K, 1)
        valid = valid[:, :, None, None, None]
        mean = (y * valid).sum((0, 3, 4)) / count
        centred = y - mean[:, :, None, None]
        variance = (centred.square() * valid).sum((0, 3, 4)) / count
        with torch.no_grad():
            share = self.momentum * active[:, None].to(count.dtype)
            self.mean.add_(share * (mean - self.mean))
            self.variance.add_(share * (variance * count / (count - 1).clamp_min(1) - self.variance))
        factor = (variance + self.eps).rsqrt() * self.weight
        return (centred * factor[:, :, None, None] + self.bias[:, :, None, None]).flatten(1, 2).to(x.dtype)


class StackedDropout(nn.Module):
    """Dropout by a factor (K, b, features) that is drawn before the pass: by `draw_`, for each client what the model's
    own layer would draw at its address."""

    def __init__(self, layer: Dropout, clients: int):
        super().__init__()
        self.p, self.clients, self.keep = layer.p, clients, None
        self.generators = [torch.Generator(layer.generator.device) for _ in range(clients)]

    def draw_(self, sizes: list[int], dtype: torch.dtype) -> None:
        """The next factors, for batches of so many samples; 0 draws nothing."""
        for keep, generator, size in zip(self.keep, self.generators, sizes, strict=True):
            if size:
                draw = torch.empty(size, keep.shape[1], dtype=dtype, device=keep.device).uniform_(generator=generator)
                keep[:size] = draw.ge_(self.p).div_(1 - self.p)

    def forward(self, x: Tensor) -> Tensor:
        x = _apart(x, self.clients)
        if self.keep is None:  # the first, trial pass tells the number of features
            self.features = x.shape[2]
            return x
        return x * self.keep[:, : x.shape[1]].to(x.dtype)


def _apart(x: Tensor, clients: int) -> Tensor:
    """(K, b, f) of (b, K * f); what has three dimensions is that already."""
    return x if x.dim() == 3 else x.unflatten(1, (clients, -1)).transpose(0, 1)
