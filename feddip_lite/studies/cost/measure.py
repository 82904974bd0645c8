"""What pruned models cost on this machine: rows of measured numbers.

`trained` makes a pruned model, `untouched` one that has its mask; `sizes` counts and weighs it, `layer_rows` and
`inference_rows` time it.
`python -m benchmarks cost` records them, notebook 10 takes a few afresh. Read before: `count.py`; after: `client.py`
(training), `tables.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from math import prod

import pandas as pd
import torch
from torch import Tensor, nn

from ...config import Config
from ...core.flat import Layout
from ...core.linear import Linear
from ...core.models import INPUT_SHAPES, build_model
from ...core.sparsity import density
from ...core.state import ServerState
from ...data.datasets import Dataset, fields_of, normalise
from ...records.kept_model import KeptModel, model_file
from ...records.names import NAMES
from ...train.observe import LastState
from ...train.run import run
from ...train.setup import layout_of, prepare
from .count import flops, latency, packed_bytes, training_flops
from .shrink import CHAINS, CSRLinear, plain, to_csr, without_dead_channels

DENSE, CSR, SHRUNK, BOTH = "dense", "CSR linear layers", "dead channels removed", "both"
"""The forms of a model that are timed; they compute the same."""


def model_name(config: Config) -> str:
    """As people write it, with its width unless that is 1."""
    return NAMES[config.model] + (f" ({config.width:g})" if config.width != 1 else "")


def untrained(dataset: str, model: str, width: float) -> nn.Module:
    """The model of that name for that data set, without loading any."""
    channels, size = INPUT_SHAPES.get(model, (1, 28))
    return build_model(model, classes=fields_of(dataset)["classes"], width=width, channels=channels, size=size)


def largest_linear(config: Config) -> tuple[int, int]:
    """(outputs, inputs) of the model's linear layer with most weights."""
    layers = untrained(config.dataset, config.model, config.width).modules()
    return max((tuple(layer.weight.shape) for layer in layers if isinstance(layer, nn.Linear)), key=prod)


def trained(config: Config) -> tuple[ServerState, Dataset, float]:
    """Run `config` to its end without recording it: the last state, the data, and the accuracy of w*m. Raises what
    `run` raises."""
    last = LastState()
    history = run(config, progress=False, observers=[last])
    return last.state, last.data, history["accuracy"].iloc[-1]


def sparse_model(state: ServerState, data: Dataset, config: Config) -> nn.Module:
    """The sparse global model w*m of a run of `config` as a module of `core/models.py`, on the CPU and in evaluation
    mode; `data` is the run's `Clients.data`, whose images fit the model."""
    module = build_model(config.model, **data.model_shape, width=config.width)
    layout, mask = layout_of(module, config), state.mask.cpu()
    kept = KeptModel(layout, layout.masked(state.weights.cpu(), mask), mask, state.buffers.cpu())
    module.load_state_dict(kept.state_dict(), strict=False)  # BatchNorm's count of batches is nobody's
    return module.eval()


def untouched(config: Config, mask: Tensor | None = None) -> tuple[ServerState, Dataset]:
    """The state before round 0, and the data: initial weights, for what depends on the mask alone. `mask` (P,) bool
    takes the place of the method's first one."""
    state, clients, _ = prepare(config)
    clients.workers.close()
    return state if mask is None else replace(state, mask=mask), clients.data


def sizes(state: ServerState, data: Dataset, config: Config) -> dict[str, float]:
    """What the sparse model w*m weighs, and what it would weigh dense.

    Returns: `sparsity`, `weights` n, `prunable` P, `kept` of them; `file` and `dense_file`, bytes of the file that a
    recorded run leaves (`records/kept_model.py`); `message` and `dense_message`, bytes that travel; `flops` and
    `dense_flops` of a forward pass of one image; `training_dense`, `training_feedback` and `training_masked`, FLOPs of
    an epoch's training on one image, dense, with error feedback and by masked SGD; `left`, the weights after
    `without_dead_channels` (NaN if the model is no chain).
    """
    once = replace(config, local_epochs=1)
    dense = replace(state, weights=torch.ones_like(state.weights), mask=torch.ones_like(state.mask))
    module = sparse_model(state, data, config)
    layout = Layout.of(module, image_shape=tuple(data.train_images.shape[1:]))
    files = [len(model_file(layout, each.weights, each.mask, each.buffers)) for each in (state, dense)]
    return {
        "sparsity": 1 - density(state.mask),
        "weights": layout.size,
        "prunable": layout.prunable,
        "kept": int(state.mask.sum()),
        **dict(zip(("file", "dense_file"), files, strict=True)),
        "message": packed_bytes(layout, state),
        "dense_message": packed_bytes(layout, dense),
        "flops": sum(flops(layout, state.mask).values()),
        "dense_flops": sum(flops(layout).values()),
        "training_dense": training_flops(layout, once, 1)["total"],
        "training_feedback": training_flops(layout, once, 1, state.mask, error_feedback=True)["total"],
        "training_masked": training_flops(layout, once, 1, state.mask)["total"],
        "left": num_weights(without_dead_channels(module)) if type(module) in CHAINS else float("nan"),
    }


def layer_rows(
    outputs: int, inputs: int, batch: int, sparsities: Sequence[float], repeats: int = 30
) -> list[dict[str, float | str]]:
    """Times of a linear layer with random weights and masks, dense and as `CSRLinear`: a row per sparsity and form
    with `sparsity`, `form`, and `lower`, `median`, `upper` in ms."""
    draw, rows = torch.Generator().manual_seed(0), []
    images = torch.randn(batch, inputs, generator=draw)
    for sparsity in sorted(sparsities):
        weight = torch.randn(outputs, inputs, generator=draw)
        weight *= torch.rand(outputs, inputs, generator=draw) >= sparsity
        stock, own = (nn.utils.skip_init(kind, inputs, outputs) for kind in (nn.Linear, Linear))
        for layer in (stock, own):
            layer.load_state_dict({"weight": weight, "bias": torch.zeros(outputs)})
        rows += _timed({"stock": stock, "own": own, CSR: CSRLinear(stock)}, images, repeats, sparsity=sparsity)
    return rows


def model_rows(module: nn.Module, images: Tensor, csr_from: float | None, repeats: int = 30) -> list[dict]:
    """Times of a pruned model and of those of its sparse and smaller forms that differ from it: a row per form, as in
    `layer_rows`.

    Args:
        images: (b, C, H, W), normalised. csr_from: the sparsity from which on a linear layer becomes CSR; None = never.
    """
    forms, bases = {"own": module}, {CSR: module}
    if type(module) in CHAINS:
        forms["stock"], small = plain(module), without_dead_channels(module)
        if num_weights(small) < num_weights(module):
            forms[SHRUNK] = bases[BOTH] = small
    for name, base in bases.items() if csr_from is not None else ():
        sparse = to_csr(base, csr_from)
        if any(isinstance(layer, CSRLinear) for layer in sparse.modules()):
            forms[name] = sparse
    return _timed(forms, images, repeats)


def crossing(rows: pd.DataFrame) -> float | None:
    """The lowest of the sparsities in `rows` from which on some form beats the dense one: its upper quartile lies below
    the dense form's lower. None if none does at the highest."""
    dense = rows[rows["form"] == DENSE].set_index("sparsity")["lower"]
    beaten = (rows["upper"] < rows["sparsity"].map(dense)).groupby(rows["sparsity"]).any()
    return min(takewhile(beaten.get, reversed(beaten.index)), default=None)


def num_weights(module: nn.Module) -> int:
    """All parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def inference_rows(
    module: nn.Module, data: Dataset, layers: Sequence[Mapping], batches: Sequence[int], repeats: int = 30
) -> list[dict]:
    """Times of a pruned model's forms for several `batches`, numbers of test images: `model_rows` with `batch`. At the
    crossing of `layers`, rows of `layer_rows` with the `batch` of each, a linear layer becomes CSR."""
    layers, rows = pd.DataFrame(layers), []
    for batch in batches:
        images = normalise(data.test_images[:batch], data)
        csr_from = crossing(layers[layers["batch"] == batch])
        rows += [{"batch": batch, **row} for row in model_rows(module, images, csr_from, repeats)]
    return rows


def _timed(forms: Mapping[str, nn.Module], images: Tensor, repeats: int, **about) -> list[dict]:
    """A row per form; of the dense ones, this package's layers and PyTorch's own, the faster is called dense."""
    times = latency(forms, images, repeats)
    dense = min((times.pop(name) for name in ("own", "stock") if name in times), key=lambda each: each["median"])
    return [{**about, "form": form, **each} for form, each in {DENSE: dense, **times}.items()]
