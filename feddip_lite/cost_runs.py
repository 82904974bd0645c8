"""What pruned models and their training cost on this machine: rows of measured numbers.

`trained` makes a pruned model, `sizes` counts and weighs it, `layer_rows` and `model_rows` time it, `client_rows` takes
seconds and peak memory of local training, each in a process of its own: this file, run as a module.
`benchmarks/cost.py` records them all, notebook 09 takes a few afresh. Read before: `cost.py`; after: `cost_report.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .arithmetic import fastest_arithmetic
from .checkpoint import Progress
from .config import Config
from .cost import client_memory, export, flops, latency, packed_bytes, sparse_model, training_flops
from .data import Dataset, fit_images, load_dataset, normalise
from .engine import advance, running
from .experiments import NAMES
from .federation import prepare
from .layout import FlatModel, Layout
from .local import local_update
from .methods import build_method
from .models import INPUT_SHAPES, build_model
from .operators import Linear
from .server import ServerState, evaluate_state, initial_state, sample_cohort
from .shrink import CHAINS, CSRLinear, plain, to_csr, without_dead_channels
from .sparsity import density
from .workers import keep_freed_memory

DENSE, CSR, SHRUNK, BOTH = "dense", "CSR linear layers", "dead channels removed", "both"
"""The forms of a model that are timed; they compute the same."""
CLIENTS = ({"method": "fedavg"}, {"method": "feddip", "initial_sparsity": 0.9}, {"method": "feddst"})
"""Whose clients are measured, at the target sparsity of 0.9 from the start: dense, with error feedback, masked SGD."""
STEPPED = 1  # a round in which none of these methods does more than train


class Trained(NamedTuple):
    """A model trained and pruned by a federation, and the FLOPs of the clients' training over all rounds: dense, with
    error feedback, and by masked SGD under the same masks."""

    state: ServerState
    data: Dataset
    accuracy: float
    flops: dict[str, int]


def model_name(config: Config) -> str:
    """As people write it, with its width unless that is 1."""
    return NAMES[config.model] + (f" ({config.width:g})" if config.width != 1 else "")


def trained(config: Config) -> Trained:
    """Run `config` to its end, without recording it.

    Raises:
        As `engine.run`.
    """
    config = config.resolved()
    state, clients, method = prepare(config)
    now, totals = Progress(state), {"dense": 0, "feedback": 0, "masked": 0}
    with closing(clients.workers), running(config):
        while now.state.round < config.rounds:
            samples = sum(len(clients.train[client]) for client in sample_cohort(config, now.state.round))
            mask, layout = now.state.mask, method.layout
            totals["dense"] += training_flops(layout, config, samples)["total"]
            totals["feedback"] += training_flops(layout, config, samples, mask, error_feedback=True)["total"]
            totals["masked"] += training_flops(layout, config, samples, mask)["total"]
            advance(now, clients, method, config)
        accuracy = evaluate_state(now.state, clients)["accuracy"]
    return Trained(now.state, clients.data, accuracy, totals)


def sizes(state: ServerState, data: Dataset, config: Config) -> dict[str, float]:
    """What the sparse model w*m weighs, and what it would weigh dense.

    Returns: `sparsity`, `weights` n, `prunable` P, `kept` of them; `file` and `dense_file`, bytes of `cost.export`;
    `message` and `dense_message`, bytes that travel; `flops` and `dense_flops` of a forward pass of one image; and
    `left`, the weights after `without_dead_channels` (NaN for a model that is no chain).
    """
    dense = replace(state, mask=torch.ones_like(state.mask))
    module, whole = (sparse_model(each, data, config) for each in (state, dense))
    layout = Layout.of(module, image_shape=tuple(data.train_images.shape[1:]))
    with TemporaryDirectory() as folder:
        files = [export(Path(folder) / "model.pt", each, data, config) for each in (module, whole)]
    return {
        "sparsity": 1 - density(state.mask.float()),
        "weights": layout.size,
        "prunable": layout.prunable,
        "kept": int(state.mask.sum()),
        **dict(zip(("file", "dense_file"), files, strict=True)),
        "message": packed_bytes(layout, state),
        "dense_message": packed_bytes(layout, dense),
        "flops": sum(flops(layout, state.mask).values()),
        "dense_flops": sum(flops(layout).values()),
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
        layers = {"stock": nn.Linear, "own": Linear}
        layers = {name: nn.utils.skip_init(kind, inputs, outputs) for name, kind in layers.items()}
        for layer in layers.values():
            layer.load_state_dict({"weight": weight, "bias": torch.zeros(outputs)})
        rows += _timed({**layers, CSR: CSRLinear(layers["stock"])}, images, repeats, sparsity=sparsity)
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


def crossing(rows: Iterable[Mapping]) -> float | None:
    """The lowest of the sparsities in `rows` from which on some form beats the dense one: its upper quartile lies below
    the dense form's lower. None if none does at the highest."""
    wins: dict[float, bool] = {}
    rows = list(rows)
    dense = {row["sparsity"]: row["lower"] for row in rows if row["form"] == DENSE}
    for row in rows:
        wins[row["sparsity"]] = wins.get(row["sparsity"], False) or row["upper"] < dense[row["sparsity"]]
    won = list(takewhile(wins.get, sorted(wins, reverse=True)))
    return won[-1] if won else None


def num_weights(module: nn.Module) -> int:
    """All parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def inference(config: Config, layers: Sequence[Mapping], batches: Sequence[int], repeats: int) -> tuple[dict, list]:
    """Train `config`, weigh the model and time its forms.

    Args:
        layers: rows of `layer_rows` with the `batch` of each; at its crossing a linear layer becomes CSR.

    Returns:
        (`sizes` with the `accuracy` and the training FLOPs of the run, rows of `model_rows` with `batch` and
        `sparsity`, the target).
    """
    state, data, accuracy, training = trained(config)
    module, rows, target = sparse_model(state, data, config), [], config.target_sparsity
    for batch in batches:
        images = normalise(data.test_images[:batch], data)
        csr_from = crossing(row for row in layers if row["batch"] == batch)
        about = {"batch": batch, "sparsity": target}
        rows += [{**about, **row} for row in model_rows(module, images, csr_from, repeats)]
    counted = {f"training_{name}": count for name, count in training.items()}
    return {**sizes(state, data, config), "target": target, "accuracy": accuracy, **counted}, rows


def client_rows(forms: Iterable[Mapping], repeats: int = 1, samples: int = 1200) -> list[dict]:
    """What `client` finds for each of `forms`, settings of `Config`, in a fresh process; they take turns, `repeats`
    times. `split` is the model, `label` the method, `seed` the number of the turn."""
    rows = []
    for turn in range(repeats):
        for settings in forms:
            command = [sys.executable, "-m", "feddip_lite.cost_runs", json.dumps(settings), str(samples)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            config = Config(**settings)
            names = {"split": model_name(config), "label": NAMES[config.method], "seed": turn}
            rows.append({**names, **json.loads(done.stdout)})
    return rows


def client(settings: Mapping, samples: int) -> dict[str, float]:
    """Local training of one client on `samples` digits, twice, in a process that has done nothing else.

    Returns: `seconds` of the second time; `peak_mib`, by how much the process has grown at most since before the
    model was made (resident memory, as Linux counts it; NaN elsewhere), so without data and Python; and
    `weights`, `gradient`, `mask`, `buffers`, `activations` and their `total`, bytes counted by `client_memory`.
    """
    config = Config(**settings).resolved()
    keep_freed_memory()
    torch.set_num_threads(1)
    data = load_dataset("digits")
    data = fit_images(data, *INPUT_SHAPES[config.model]) if config.model in INPUT_SHAPES else data
    channels, size = data.train_images.shape[1:3]
    indices, images = torch.arange(samples), normalise(data.train_images[: config.batch_size], data)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak of the imports is forgotten
    before = _resident("VmRSS")
    module = build_model(config.model, classes=data.classes, width=config.width, channels=channels, size=size)
    model = FlatModel(module, Layout.of(module))
    model.arithmetic = fastest_arithmetic(model, size, config.precision)
    method = build_method(config, model.layout)
    plan = method.plan(method.offer(initial_state(method, model), STEPPED, 0), {}, STEPPED)
    for _ in range(2):
        begin = time.perf_counter()
        local_update(model, plan, data, indices, config, STEPPED, 0)
        seconds = time.perf_counter() - begin
    peak, feedback = _resident("VmHWM") - before, plan.mask is not None and not plan.project
    counted = client_memory(module, model.layout, images, plan.mask, error_feedback=feedback)
    return {"seconds": seconds, "peak_mib": peak, **counted}


def _timed(forms: Mapping[str, nn.Module], images: Tensor, repeats: int, **about) -> list[dict]:
    """A row per form; of the dense ones, this package's layers and PyTorch's own, the faster is called dense."""
    times = latency(forms, images, repeats)
    dense = min((times.pop(name) for name in ("own", "stock") if name in times), key=lambda each: each.median)
    return [{**about, "form": form, **each._asdict()} for form, each in {DENSE: dense, **times}.items()]


def _resident(field: str) -> float:
    """MiB of this process, now (`VmRSS`) or at most (`VmHWM`); NaN where there is no /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field)), float("nan"))


if __name__ == "__main__":
    print(json.dumps(client(json.loads(sys.argv[1]), int(sys.argv[2]))))
