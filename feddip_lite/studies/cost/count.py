"""What a model costs: operations, memory, bytes and milliseconds, dense and sparse.

One FLOP is one multiplication or one addition. Counted are the weights of convolutions and linear layers, the padding
of a convolution included; biases, activations, pooling, BatchNorm and the SGD step (a few operations per weight and
step) are left out. What unstructured sparsity saves in FLOPs is time only where kernels skip zeros: `latency` measures
it. Read before: `core/flat.py`, `shrink.py`. Read next: `measure.py`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from copy import deepcopy
from math import prod

import numpy as np
import torch
from torch import Tensor, nn

from ...config import Config
from ...core.flat import Layout
from ...core.message import num_bytes
from ...core.sparsity import kept_per_layer
from ...core.state import ServerState
from ...methods.base import Method


def flops(layout: Layout, mask: Tensor | None = None) -> dict[str, int]:
    """Forward FLOPs per sample by tensor, 2 * uses for every kept weight; their sum is the model's.

    Args:
        layout: made with `image_shape`.
        mask: (P,) bool, True = kept; None = dense.

    Raises:
        ValueError: a mask of another length, or a layout that does not know how often its weights are used.
    """
    if mask is not None and mask.shape != (layout.prunable,):
        raise ValueError(f"mask: shape {tuple(mask.shape)} is not valid; expected ({layout.prunable},)")
    convolutions = [slot for slot in layout.slots if len(slot.shape) == 4]
    if convolutions and all(slot.uses == 1 for slot in convolutions):
        raise ValueError("layout: uses are unknown; expected one made with image_shape")
    kept = {slot.name: prod(slot.shape) for slot in layout.weight_slots}
    if mask is not None:
        names = [slot.name for slot in layout.prunable_slots]
        kept |= dict(zip(names, kept_per_layer(layout, mask), strict=True))
    return {slot.name: 2 * slot.uses * kept[slot.name] for slot in layout.weight_slots}


def training_flops(
    layout: Layout, config: Config, samples: int, mask: Tensor | None = None, *, error_feedback: bool = False
) -> dict[str, int]:
    """FLOPs of one round's local training: `forward`, `input_gradient`, `weight_gradient` and their `total`.

    Each of the three costs as much as a forward pass, over `config.local_epochs` passes; only the first layer needs no
    input gradient. They are what kernels that skip zeros would do: the dense ones used here do the dense count.

    Args:
        layout: made with `image_shape`; its first tensor is the layer that sees the images.
        samples: training samples of all participants together, each counted once.
        mask: (P,) bool; None = dense.
        error_feedback: the weight gradient is needed for pruned weights too and stays dense (slides, Eq. 1-2: FedDP,
            FedDIP, and every other method that scores or regrows by gradients); False = masked SGD.

    Raises:
        ValueError: as `flops`.
    """
    sparse, dense = flops(layout, mask), flops(layout)
    forward = sum(sparse.values())
    parts = {
        "forward": forward,
        "input_gradient": forward - sparse[layout.slots[0].name],
        "weight_gradient": sum((dense if error_feedback else sparse).values()),
    }
    parts = {name: count * samples * config.local_epochs for name, count in parts.items()}
    return {**parts, "total": sum(parts.values())}


def activation_bytes(module: nn.Module, images: Tensor) -> int:
    """Bytes that a forward pass of `images` (b, C, H, W) keeps for the backward pass, the images included.

    Measured: every tensor that autograd saves, but weights, each storage once. The same for a sparse model: zeros among
    the weights leave the activations as many. `module` is unchanged.
    """
    module = deepcopy(module).train()
    own = {part.untyped_storage().data_ptr() for part in (*module.parameters(), *module.buffers())}
    saved = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the output of an operation kept by that operation would never be freed

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(images)
    del output  # until here it held the graph, so that no storage was freed and its address given to another
    return sum(saved.values())


def client_memory(
    module: nn.Module, layout: Layout, images: Tensor, mask: Tensor | None = None, *, error_feedback: bool = False
) -> dict[str, int]:
    """Bytes that a client's training needs at once, at the end of a forward pass, and their `total`.

    `weights` and `gradient`: float32, n each, and with error feedback the dense w beside w*m; `mask`: a byte per
    prunable weight; `buffers`: BatchNorm statistics; `activations`: of one batch (`activation_bytes`). Backward frees
    activations while it goes; the workspace of kernels, data sets, messages and Python itself are not counted.

    Args:
        images: (b, C, H, W), one batch of network input.
        mask: (P,) bool; None = dense, for which there is no `error_feedback`.
    """
    parts = {
        "weights": 4 * layout.size * (2 if error_feedback else 1),
        "gradient": 4 * layout.size,
        "mask": 0 if mask is None else layout.prunable,
        "buffers": 4 * layout.buffer_size,
        "activations": activation_bytes(module, images),
    }
    return {**parts, "total": sum(parts.values())}


def packed_bytes(layout: Layout, state: ServerState) -> int:
    """Size of the sparse model w*m as a message: kept values, the mask's code (which is the indices), BatchNorm
    statistics, header and checksum. Bytes, the length of `encode`'s form; a full mask does not travel."""
    return num_bytes(Method(layout, rounds=1, seed=0).offer(state, 0, 0))


def latency(modules: Mapping[str, nn.Module], images: Tensor, repeats: int = 30) -> dict[str, dict[str, float]]:
    """Wall time of a forward pass of `images` (b, ...), by name, with as many threads as PyTorch is set to: `lower`,
    `median` and `upper`, quartiles of the `repeats` (at least 1), in ms.

    The modules take turns, so that a machine that slows down does so for all; three passes each come first, untimed.
    For CPUs: nobody waits for a GPU here. Modules are put into evaluation mode.
    """
    times: dict[str, list[float]] = {name: [] for name in modules}
    with torch.inference_mode():
        for turn in range(-3, repeats):
            for name, module in modules.items():
                start = time.perf_counter_ns()
                module.eval()(images)
                if turn >= 0:
                    times[name].append((time.perf_counter_ns() - start) / 1e6)
    quartiles = {"lower": 0.25, "median": 0.5, "upper": 0.75}
    return {name: {key: float(np.quantile(own, q)) for key, q in quartiles.items()} for name, own in times.items()}
