"""A pruned model made smaller or faster without changing what it computes.

`plain` writes LeNet-5 and AlexNet as a chain of stock layers, `without_dead_channels` removes from a chain what no
image can make matter, `to_csr` stores linear layers sparsely. Read next: `count.py`, which measures them.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from copy import deepcopy
from itertools import pairwise

import torch
from torch import Tensor, nn

from ...core.models import AlexNet, LeNet5

CHAINS = {
    LeNet5: "conv1 pool relu conv2 pool relu flatten fc1 relu fc2 relu fc3",
    AlexNet: "conv1 pool relu conv2 pool relu conv3 relu conv4 relu conv5 pool relu average flatten "
    "dropout fc1 relu dropout fc2 relu fc3",
}
"""The models that are a chain, as the steps of their forward pass; a step without weights is one of `STEPS`."""

STEPS = {
    "pool": lambda: nn.MaxPool2d(2),
    "relu": nn.ReLU,
    "average": lambda: nn.AdaptiveAvgPool2d(2),
    "flatten": nn.Flatten,
    "dropout": nn.Dropout,
}

WEIGHTED = nn.Conv2d | nn.Linear
# What these make of a constant channel is constant; a pool that pads with zeros, for one, would not keep it so.
_BETWEEN = {nn.ReLU, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Dropout, nn.Identity}


def plain(module: nn.Module) -> nn.Sequential:
    """The same function as a chain of PyTorch's own layers, in evaluation mode; layers with weights keep their names.

    Args:
        module: `LeNet5`, `AlexNet` or an `nn.Sequential` (whose layers are copied as they are); unchanged.

    Returns:
        A chain with weights of its own (never views into a flat vector), on the CPU. Equal up to rounding, since
        stock linear layers may sum in another order.

    Raises:
        ValueError: any other model; ResNet-18 is no chain.
    """
    if isinstance(module, nn.Sequential):
        layers = module.named_children()
    elif type(module) in CHAINS:
        steps = CHAINS[type(module)].split()
        layers = ((f"{s}{i}", STEPS[s]()) if s in STEPS else (s, getattr(module, s)) for i, s in enumerate(steps))
    else:
        raise ValueError(f"module: {type(module).__name__} is no chain of layers; expected LeNet5, AlexNet, Sequential")
    copies = (
        (n, _like(layer, layer.weight, layer.bias) if isinstance(layer, WEIGHTED) else deepcopy(layer))
        for n, layer in layers
    )
    return nn.Sequential(OrderedDict(copies)).eval()


def without_dead_channels(module: nn.Module) -> nn.Sequential:
    """A smaller chain with the same outputs (in evaluation mode, up to rounding): dead channels are removed.

    * A channel without incoming weights is its bias everywhere, whatever the image. The next layer's bias takes over
      what it contributes, unless that layer pads with zeros and the constant is not 0: at the border it then
      contributes less, and the channel stays.
    * A channel that no weight of the next layer reads is removed whatever it holds.

    Each may bring about the next, so the first is sought from input to output, the second back again. A layer keeps
    at least one channel.

    Args:
        module: as for `plain`; every convolution and linear layer needs a bias, convolutions one group; only ReLU, max
            pooling, adaptive average pooling, flattening and dropout in between. Unchanged.

    Raises:
        ValueError: a module of another kind, naming the layer.
    """
    chain = plain(module)
    between = _checked(chain)
    names = list(between)
    weights = {name: chain.get_submodule(name).weight.detach() for name in names}
    biases = {name: chain.get_submodule(name).bias.detach().double() for name in names}

    def columns(name: str, channels: int) -> Tensor:  # (outputs, input channels, weights on each)
        return weights[name].reshape(len(weights[name]), channels, -1)

    def remove(name: str, reader: str, dead: Tensor) -> None:
        kept, shape = ~dead, weights[reader].shape
        weights[reader] = columns(reader, len(dead))[:, kept].reshape(shape[0], -1, *shape[2:])
        weights[name], biases[name] = weights[name][kept], biases[name][kept]

    for name, reader in pairwise(names):
        constant = biases[name].clamp(min=0) if nn.ReLU in between[reader] else biases[name]
        pads = getattr(chain.get_submodule(reader), "padding", (0, 0)) not in ((0, 0), "valid")
        dead = ~weights[name].flatten(1).any(1) & ((constant == 0) | (not pads))
        dead[0] &= ~dead.all()
        biases[reader] += columns(reader, len(dead)).double().sum(2)[:, dead] @ constant[dead]
        remove(name, reader, dead)
    for name, reader in reversed(list(pairwise(names))):
        dead = ~columns(reader, len(weights[name])).any(2).any(0)
        dead[0] &= ~dead.all()
        remove(name, reader, dead)
    for name in names:
        setattr(chain, name, _like(chain.get_submodule(name), weights[name], biases[name]))
    return chain.eval()


class CSRLinear(nn.Module):
    """A linear layer whose zeros are neither stored nor multiplied: weight in CSR form with int32 indices, so 8 bytes
    per kept weight and 4 per output. For inference; `layer` is unchanged."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        with warnings.catch_warnings():  # PyTorch calls CSR beta, once per process
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
            csr = layer.weight.detach().to_sparse_csr()
            indices = (csr.crow_indices().int(), csr.col_indices().int())  # what MKL takes without a copy
            csr = torch.sparse_csr_tensor(*indices, csr.values(), csr.shape, check_invariants=True)
        bias = csr.values().new_zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach().clone()
        self.register_buffer("weight", csr)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias[:, None], self.weight, x.t()).t()


def to_csr(module: nn.Module, from_sparsity: float = 0.9) -> nn.Module:
    """A copy of `module`, in evaluation mode, whose linear layers are `CSRLinear` from that share of zeros on, which is
    in [0, 1]; `measure.layer_rows` measures which pays off."""
    copy = nn.Sequential(deepcopy(module)).eval()  # so that a single linear layer has an owner, too
    for path, layer in list(copy.named_modules()):
        if isinstance(layer, nn.Linear) and float((layer.weight == 0).double().mean()) >= from_sparsity:
            owner, _, name = path.rpartition(".")
            setattr(copy.get_submodule(owner), name, CSRLinear(layer))
    return copy[0]


def _like(layer: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Conv2d | nn.Linear:
    """A stock layer with the settings of `layer` and copies of `weight` and `bias`, whose counts may differ."""
    kind, inputs, settings = nn.Linear, weight.shape[1], {"bias": bias is not None, "dtype": weight.dtype}
    if isinstance(layer, nn.Conv2d):
        kind, inputs = nn.Conv2d, inputs * layer.groups
        names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        settings |= {name: getattr(layer, name) for name in names}
    new = nn.utils.skip_init(kind, inputs, len(weight), **settings)  # draws nothing
    with torch.no_grad():
        new.weight.copy_(weight)
        if bias is not None:
            new.bias.copy_(bias)
    return new


def _checked(chain: nn.Sequential) -> dict[str, set[type]]:
    """The kinds of layers before each layer with weights, since the one before; ValueError as promised above."""
    between, kinds, above = {}, set(), None
    for name, layer in chain.named_children():
        if not isinstance(layer, WEIGHTED):
            if above is not None and type(layer) not in _BETWEEN:
                raise ValueError(f"module: layer {name!r} is {type(layer).__name__}; constants are not followed there")
            kinds.add(type(layer))
            continue
        if layer.bias is None or getattr(layer, "groups", 1) != 1 or getattr(layer, "padding_mode", "zeros") != "zeros":
            raise ValueError(f"module: layer {name!r} needs a bias, one group and padding with zeros")
        if isinstance(above, nn.Conv2d) and isinstance(layer, nn.Linear) and nn.Flatten not in kinds:
            raise ValueError(f"module: layer {name!r} follows a convolution without nn.Flatten")
        between[name], kinds, above = kinds, set(), layer
    return between
