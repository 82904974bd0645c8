"""Weights are a vector: named tensors <-> one flat vector, prunable coordinates first.

The paper writes w, m in R^n, and so does this package. `Layout` says where each tensor lives in that vector;
`FlatModel` is a module whose parameters, gradients and running statistics are *views* into three flat vectors, so
that a masked model is one multiplication and an SGD step two vector operations. Read next: `train/client.py`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from typing import Self

import torch
from torch import Tensor, nn

from .autograd import Autograd
from .cache import once_per_tensor
from .linear import Linear

TRANSPOSED = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
SEQUENTIAL = nn.RNNBase | nn.MultiheadAttention
PRUNABLE = nn.Linear | nn.Bilinear | nn.Conv1d | nn.Conv2d | nn.Conv3d | TRANSPOSED | SEQUENTIAL
"""Layers whose weights are prunable."""


@dataclass(frozen=True)
class Slot:
    """One named tensor: `shape`, and its place `[start, stop)` in the flat vector.

    `uses` is how often each of its weights is multiplied per sample: a convolution's output positions, 1 for a linear
    layer, and 1 wherever the size of the images was not given. So a weight costs 2 * `uses` FLOPs forward.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    uses: int = 1

    def of(self, vector: Tensor) -> Tensor:
        """The view of `vector` ((n,), any dtype) that is this tensor, in its own shape."""
        return vector[self.start : self.stop].view(self.shape)


@dataclass(frozen=True)
class Layout:
    """Where every tensor of a model lives in the flat vectors.

    `slots` are the trainable tensors, prunable ones first, each group in module order; `num_prunable` of them are
    prunable. `buffer_slots` are the BatchNorm running means and variances, in a second vector of their own.
    """

    slots: tuple[Slot, ...]
    num_prunable: int
    buffer_slots: tuple[Slot, ...]

    @classmethod
    def of(
        cls,
        module: nn.Module,
        *,
        image_shape: tuple[int, ...] | None = None,
        include_shortcut: bool = False,
        dense_layers: str = "none",
    ) -> Self:
        """The layout of `module`.

        Prunable are the weights of convolutions, linear, recurrent and attention layers; not biases, norms and
        embeddings, and not what the module's own `kept_dense` names: the 1x1 shortcut convolutions of ResNet, unless
        `include_shortcut` (docs/deviations.md D19). A tensor that two layers share is one; what is frozen
        (`requires_grad` False) has no place. `dense_layers` spares the "first" or "last" layer that would be prunable,
        or "both". With the `image_shape` (channels, height, width) of its input, slots know how often their weights are
        used.
        """
        prunable, dense, seen = {}, [], set()  # prunable: layer -> its tensors
        spared = set() if include_shortcut else {*getattr(module, "kept_dense", ())}
        for path, layer in module.named_modules():
            for name, parameter in layer.named_parameters(prefix=path, recurse=False):
                if not parameter.requires_grad or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                is_weight = isinstance(layer, PRUNABLE) and "weight" in name.rpartition(".")[2] and parameter.dim() > 1
                kept_dense = not spared.isdisjoint(path.split("."))
                own = prunable.setdefault(path, []) if is_weight and not kept_dense else dense
                own.append((name, tuple(parameter.shape)))
        ends = {"none": (), "first": (0,), "last": (-1,), "both": (0, -1)}[dense_layers]
        for path in dict.fromkeys([*prunable][end] for end in ends if prunable):
            dense = prunable.pop(path) + dense
        prunable = [tensor for tensors in prunable.values() for tensor in tensors]
        buffers = [(name, tuple(b.shape)) for name, b in module.named_buffers() if b.is_floating_point()]
        uses = uses_per_sample(module, image_shape) if image_shape else {}
        return cls.placed(prunable + dense, len(prunable), buffers, uses)

    @classmethod
    def placed(
        cls,
        tensors: Sequence[tuple[str, tuple[int, ...]]],
        num_prunable: int,
        buffers: Sequence[tuple[str, tuple[int, ...]]] = (),
        uses: Mapping[str, int] | None = None,
    ) -> Self:
        """The layout of these (name, shape) one after the other, of which the first `num_prunable` are prunable."""
        return cls(_place(tensors, uses or {}), num_prunable, _place(buffers, {}))

    @property
    def size(self) -> int:
        """n, the number of trainable weights."""
        return self.slots[-1].stop

    @property
    def prunable(self) -> int:
        """P, the number of prunable weights: coordinates 0 .. P-1 of every flat vector."""
        return self.prunable_slots[-1].stop

    @property
    def prunable_slots(self) -> tuple[Slot, ...]:
        """The slots of the prunable tensors, in order; together they cover [0, P)."""
        return self.slots[: self.num_prunable]

    @property
    def weight_slots(self) -> tuple[Slot, ...]:
        """The slots of all weights of convolutions and linear layers: the prunable ones, then those that stay dense."""
        return tuple(slot for slot in self.slots if len(slot.shape) > 1)

    @property
    def buffer_size(self) -> int:
        """Length of the flat vector of BatchNorm running statistics (0 without BatchNorm)."""
        return self.buffer_slots[-1].stop if self.buffer_slots else 0

    def masked(self, weights: Tensor, mask: Tensor) -> Tensor:
        """w * m as a new (n,) vector: pruned coordinates are 0, unprunable ones copied. `mask` is (P,) bool."""
        result = weights.clone()
        result[: self.prunable] *= mask
        return result

    def pack(self, weights: Tensor, mask: Tensor | None) -> Tensor:
        """What a sparse model weighs: the kept prunable values in order, then all unprunable ones.

        With `mask` None all n values. Returns float32 (kept + n - P,).
        """
        if mask is None:
            return weights
        return torch.cat([weights.index_select(0, kept_indices(mask)), weights[self.prunable :]])

    def check_packed(self, values: Tensor | None, mask: Tensor | None) -> int:
        """How many weights `mask` (P,) keeps, if so many prunable `values` are here, or all n.

        Raises:
            ValueError: the number of values fits neither the mask nor a dense vector.
        """
        unprunable = self.size - self.prunable
        kept = self.prunable if mask is None else len(kept_indices(mask))
        count = 0 if values is None else values.numel()
        if values is None or values.dim() != 1 or count not in (kept + unprunable, self.size):
            raise ValueError(f"values: {count} of them; expected {kept + unprunable} or all {self.size}")
        return kept

    def unpack(self, values: Tensor, mask: Tensor | None) -> Tensor:
        """The inverse of `pack`: a new (n,) vector, 0 where pruned. n values are a dense vector, whatever the mask.

        Raises:
            ValueError: the number of values fits neither the mask nor a dense vector.
        """
        kept = self.check_packed(values, mask)
        if values.shape == (self.size,):
            return values.clone()
        weights = values.new_zeros(self.size)
        weights.index_copy_(0, kept_indices(mask), values[:kept])
        weights[self.prunable :] = values[kept:]
        return weights


@once_per_tensor
def kept_indices(mask: Tensor) -> Tensor:
    """The coordinates that `mask` (P,) bool keeps: int64 (kept,), ascending."""
    return mask.nonzero().view(-1)


class FlatModel:
    """A module bound to flat vectors: writing `weights` changes its parameters, its gradients appear in `gradient`.

    Attributes: `weights` (n,), `gradient` (n,) and `buffers` (BatchNorm statistics), all of `dtype` on `device`;
    `kernels` compute loss and gradient at `weights`; `pause` is called where a job may let others go first; `draws`
    says whether the module draws from PyTorch's global generator, as `nn.Dropout` does.
    """

    def __init__(
        self, module: nn.Module, layout: Layout, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ):
        self.module = module.to(device, dtype)
        self.layout = layout
        self.weights = torch.zeros(layout.size, device=device, dtype=dtype)
        self.gradient = torch.zeros(layout.size, device=device, dtype=dtype)
        self.buffers = torch.zeros(layout.buffer_size, device=device, dtype=dtype)
        parameters = dict(module.named_parameters())
        for slot in layout.slots:
            parameter = parameters[slot.name]
            slot.of(self.weights).copy_(parameter.detach())
            parameter.data = slot.of(self.weights)
            parameter.grad = slot.of(self.gradient)
        statistics = dict(module.named_buffers())
        for slot in layout.buffer_slots:
            slot.of(self.buffers).copy_(statistics[slot.name])
            statistics[slot.name].data = slot.of(self.buffers)
        for layer in module.modules():
            if isinstance(layer, Linear) and layer.weight.requires_grad:
                layer.bound = True
        self.kernels = Autograd(self.module, self.gradient)
        self.pause = lambda: None
        self.draws = False

    @contextmanager
    def drawing(self, seed: int):
        """Here the module draws as `seed` says, and the global generators are afterwards as they were. Only one model
        of a process may draw at a time."""
        if not self.draws:
            yield
            return
        with torch.random.fork_rng(devices=[self.weights.device] if self.weights.is_cuda else []):
            torch.manual_seed(seed)
            yield

    def load(self, weights: Tensor, mask: Tensor | None, buffers: Tensor | None = None) -> None:
        """Set the parameters to w * m (`mask` float or bool (P,), None = dense), and the statistics if given."""
        if mask is None:
            self.weights.copy_(weights)
        else:
            prunable = self.layout.prunable
            torch.mul(weights[:prunable], mask, out=self.weights[:prunable])
            self.weights[prunable:] = weights[prunable:]
        if buffers is not None:
            self.buffers.copy_(buffers)


def uses_per_sample(module: nn.Module, image_shape: tuple[int, ...]) -> dict[str, int]:
    """How often each prunable weight is multiplied for one image, by tensor name: output positions of a convolution,
    input positions of a transposed one, steps of a recurrent or attention layer.

    Found by a forward pass of one black image through a copy; `module` stays as it is. (PyTorch's "meta" device would
    need no storage, but seconds of imports.)
    """
    uses: dict[str, int] = {}
    copy = deepcopy(module).eval()
    for path, layer in copy.named_modules():
        if isinstance(layer, PRUNABLE):

            def count(layer, inputs, named, output, path=path):
                x = (*inputs, *named.values())[0]
                if isinstance(layer, SEQUENTIAL):
                    times = x.numel() // x.shape[-1]
                else:
                    times = (x if isinstance(layer, TRANSPOSED) else output).numel() // layer.weight.shape[0]
                for name, _ in layer.named_parameters(prefix=path):
                    if "weight" in name.rpartition(".")[2]:
                        uses[name] = uses.get(name, 0) + times

            layer.register_forward_hook(count, with_kwargs=True)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        copy(torch.zeros(1, *image_shape))
    return uses


def _place(tensors: Sequence[tuple[str, tuple[int, ...]]], uses: Mapping[str, int]) -> tuple[Slot, ...]:
    slots, start = [], 0
    for name, shape in tensors:
        slots.append(Slot(name, tuple(shape), start, stop=start + prod(shape), uses=uses.get(name, 1)))
        start += prod(shape)
    return tuple(slots)


def sha256_of(tensors: Mapping[str, Tensor]) -> str:
    """Checksum of named tensors: hex digest over name, dtype, shape and bytes, in order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
