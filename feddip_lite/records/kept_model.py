"""The model that a recorded run leaves: one safetensors file, readable without this package.

    values   float32 (kept + n - P,), w*m: the prunable weights that the mask keeps, in order, then all unprunable ones
    mask     uint8 (ceil(P / 8),), as `numpy.packbits` makes it: is prunable weight i kept
    buffers  float32 (b,), BatchNorm's running means and variances; absent without BatchNorm

A dense model has all n values and no mask. The metadata's `layout`, JSON, names the tensors that lie one after the
other in `values` and `buffers`, with their shapes, and says how many are prunable.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..core.flat import Layout


@dataclass(frozen=True)
class KeptModel:
    """A sparse model: `weights` (n,) float32, zero where `mask` (P,) bool is False, and `buffers` (b,) float32."""

    layout: Layout
    weights: Tensor
    mask: Tensor
    buffers: Tensor

    def state_dict(self) -> dict[str, Tensor]:
        """Name -> tensor in its own shape: weights, then BatchNorm's statistics."""
        weights = {slot.name: slot.of(self.weights) for slot in self.layout.slots}
        return weights | {slot.name: slot.of(self.buffers) for slot in self.layout.buffer_slots}


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
    told = {
        "tensors": [(slot.name, slot.shape) for slot in layout.slots],
        "statistics": [(slot.name, slot.shape) for slot in layout.buffer_slots],
        "prunable": layout.num_prunable,
    }
    return save(tensors, {"layout": json.dumps(told)})


def read_model_file(path) -> KeptModel:
    """The model in a file that `model_file` made.

    Raises:
        ValueError: it is damaged, or another kind of file; names it.
        FileNotFoundError: there is none.
    """
    try:
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
            told = json.loads(file.metadata()["layout"])
        layout = Layout.placed(told["tensors"], told["prunable"], told["statistics"])
        mask = torch.ones(layout.prunable, dtype=torch.bool)
        if "mask" in stored:
            mask = torch.from_numpy(np.unpackbits(stored["mask"].numpy(), count=layout.prunable).view(np.bool_))
        weights = layout.unpack(stored["values"], mask)
        return KeptModel(layout, weights, mask, stored.get("buffers", torch.zeros(0)))
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged, or not the model of a recorded run ({error})") from error
