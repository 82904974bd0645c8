"""What local training costs a client on this machine: seconds and peak memory, each client in a process of its own.

That process runs this file as a module. Read before: `measure.py`; after: `tables.py`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import product
from pathlib import Path

import torch

from ...config import Config
from ...core.flat import FlatModel, Layout
from ...core.models import INPUT_SHAPES
from ...data.datasets import fit_images, load_dataset, normalise
from ...records.names import NAMES
from ...train.client import local_update
from ...train.setup import build_method, initial_state, kernels_of
from ...train.workers import keep_freed_memory
from .count import client_memory
from .measure import model_name, untrained

_MASKED = {"method": "feddip", "initial_sparsity": 0.9, "method_options": {"erk": "shared"}}  # before any round, too
CLIENTS = ({"method": "fedavg"}, _MASKED, {"method": "feddst"})
"""Whose clients are measured, at the target sparsity of 0.9 from the start: dense, with error feedback, masked SGD."""
ROUND = 501  # of 1000: FedDIP's penalty is on, and FedDST chooses no mask


def client_rows(
    forms: Iterable[Mapping], repeats: int = 1, samples: int = 1200, side_by_side: int = 1
) -> list[dict[str, float | str]]:
    """What `client` finds for each of `forms`, settings of `Config`, in a fresh process; they take turns, `repeats`
    times. `split` is the model, `label` the method, `seed` the number of the turn. Several processes `side_by_side` are
    done sooner, but disturb each other's times."""

    def row_of(turn: int, settings: Mapping) -> dict[str, float | str]:
        command = [sys.executable, "-m", "feddip_lite.studies.cost.client", json.dumps(settings), str(samples)]
        done, config = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True), Config(**settings)
        return {"split": model_name(config), "label": NAMES[config.method], "seed": turn, **json.loads(done.stdout)}

    with ThreadPoolExecutor(side_by_side) as pool:
        return list(pool.map(row_of, *zip(*product(range(repeats), forms), strict=True)))


def client(settings: Mapping, samples: int) -> dict[str, float]:
    """Local training of one client on `samples` digits, in a process that has done nothing else.

    Returns: `seconds`, the median of three times after a first; `peak_mib`, by how much the process has grown at most
    since before the model was made (resident memory, as Linux counts it; NaN elsewhere), so without data and Python;
    and `weights`, `gradient`, `mask`, `buffers`, `activations` and their `total`, bytes counted by `client_memory`.
    """
    config = Config(**settings).resolved()
    keep_freed_memory()
    torch.set_num_threads(1)
    data = load_dataset("digits")
    data = fit_images(data, *INPUT_SHAPES[config.model]) if config.model in INPUT_SHAPES else data
    indices, images = torch.arange(samples), normalise(data.train_images[: config.batch_size], data)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak of the imports is forgotten
    before = _resident("VmRSS")
    module = untrained("digits", config.model, config.width)
    model = FlatModel(module, Layout.of(module))
    model.kernels = kernels_of(model, images.shape[-1], config.precision)
    method = build_method(config, model.layout)
    plan = method.plan(method.offer(initial_state(method, model), ROUND, 0), {}, ROUND)
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        local_update(model, plan, data, indices, config, ROUND, 0)
        times.append(time.perf_counter() - begin)
    peak, feedback = _resident("VmHWM") - before, plan.mask is not None and not plan.project
    counted = client_memory(module, model.layout, images, plan.mask, error_feedback=feedback)
    return {"seconds": statistics.median(times[1:]), "peak_mib": peak, **counted}


def _resident(field: str) -> float:
    """MiB of this process, now (`VmRSS`) or at most (`VmHWM`); NaN where there is no /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field)), float("nan"))


if __name__ == "__main__":
    print(json.dumps(client(json.loads(sys.argv[1]), int(sys.argv[2]))))
