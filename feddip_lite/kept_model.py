"""The model that a recorded run leaves: one safetensors file, readable without this package.

    values   float32 (kept + n - P,), w*m: the prunable weights that the mask keeps, in order, then all unprunable ones
    mask     uint8 (ceil(P / 8),), as `numpy.packbits` makes it: is prunable weight i kept
    buffers  float32 (b,), BatchNorm's running means and variances; absent without BatchNorm

A dense model has all n values and no mask. The metadata's `layout`, JSON, names the
tensors that lie one after the other in `values` and `buffers`, with their shapes, and says how many are prunable.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .layout import Layout, Slot

LARGEST_COMMITTED = 100 * 1024  # bytes; larger model files stay out of the repository


@dataclass(frozen=True)
class KeptModel:
    """A sparse model: `weights` (n,) float32, zero where `mask` (P,) bool is False, and `buffers` (b,) float32.

    `tensors` and `statistics`: (name, shape) of each part of `weights` and `buffers`, in order.
    """

    weights: Tensor
    mask: Tensor
    buffers: Tensor
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    statistics: tuple[tuple[str, tuple[int, ...]], ...]

    def state_dict(self) -> dict[str, Tensor]:
        """Name -> tensor in its own shape: weights, then BatchNorm's statistics."""
        named = {}
        for vector, parts in ((self.weights, self.tensors), (self.buffers, self.statistics)):
            pieces = vector.split([prod(shape) for _, shape in parts])
            named |= {name: piece.view(shape) for (name, shape), piece in zip(parts, pieces, strict=True)}
        return named


def model_file(layout: Layout, weights: Tensor, mask: Tensor, buffers: Tensor) -> bytes:
    """The file of the sparse model w*m; the same model gives the same bytes.

    Args:
        weights: (n,) float32, dense or not. mask: (P,) bool. buffers: (b,) float32. On any device.
    """
    weights, mask, buffers = weights.detach().cpu(), mask.cpu(), buffers.detach().cpu()
    tensors = {"values": weights.contiguous()}
    if not mask.all():  # a bit per weight costs more than it saves if less than a 32nd is pruned, which no method does
        tensors = {"values": layout.pack(weights, mask), "mask": torch.from_numpy(np.packbits(mask.numpy()))}
    if len(buffers):
        tensors["buffers"] = buffers.contiguous()
    described = {"tensors": _described(layout.slots), "statistics": _described(layout.buffer_slots)}
    return save(tensors, {"layout": json.dumps({**described, "prunable": layout.num_prunable})})


def read_model_file(path) -> KeptModel:
    """The model in a file that `model_file` made.

    Raises:
        ValueError: it is damaged, or another kind of file; names it.
        FileNotFoundError: there is none.
    """
    try:
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
            layout = json.loads(file.metadata()["layout"])
        tensors, statistics = _parts(layout["tensors"]), _parts(layout["statistics"])
        size = sum(prod(shape) for _, shape in tensors)
        prunable = sum(prod(shape) for _, shape in tensors[: layout["prunable"]])
        mask, weights = torch.ones(prunable, dtype=torch.bool), stored["values"]
        if "mask" in stored:
            mask = torch.from_numpy(np.unpackbits(stored["mask"].numpy(), count=prunable).astype(bool))
            kept, weights = int(mask.sum()), torch.zeros(size)
            weights[:prunable][mask] = stored["values"][:kept]
            weights[prunable:] = stored["values"][kept:]
        return KeptModel(weights, mask, stored.get("buffers", torch.zeros(0)), tensors, statistics)
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged, or not the model of a recorded run ({error})") from error


def _described(slots: Sequence[Slot]) -> list[list]:
    return [[slot.name, list(slot.shape)] for slot in slots]


def _parts(described: list) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, tuple(shape)) for name, shape in described)
