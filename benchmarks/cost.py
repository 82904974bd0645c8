"""What pruning saves, measured on this machine.

* clients: seconds and peak memory of local training, each in a process of its own: dense, FedDIP, masked SGD.
* layers: each model's largest linear layer, dense and CSR, over sparsities.
* models, times: size and latency of the whole model under random ERK masks, as FedDIP starts with, and under those that
  recorded runs of FedDIP (profile lite, IID, seed 0) ended with. What is measured depends on the mask alone, so weights
  are initial ones. Forms: dense, CSR linear layers, dead channels removed, both.

One thread. From the record notebook 10, a part of the README and two claims are made; it has the machine's load before
and after. Data: Fashion-MNIST, CIFAR-10, CIFAR-100.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import asdict

import torch

from feddip_lite.config import Config
from feddip_lite.records.catalogue import recorded
from feddip_lite.records.provenance import provenance
from feddip_lite.records.store import ROOT, read_mask
from feddip_lite.studies.cost.client import CLIENTS, client_rows
from feddip_lite.studies.cost.measure import (
    inference_rows,
    largest_linear,
    layer_rows,
    model_name,
    sizes,
    sparse_model,
    untouched,
)

MODELS = (
    {"dataset": "fashionmnist", "model": "lenet5"},
    {"dataset": "cifar10", "model": "alexnet", "width": 0.25},
    {"dataset": "cifar100", "model": "resnet18", "width": 0.25},
)
BATCHES = (1, 128)
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
FULL = {"client_turns": 5, "client_samples": 1200, "repeats": 101, "sparsities": SPARSITIES, "batches": BATCHES}
REHEARSAL = {"client_turns": 3, "client_samples": 128, "repeats": 9, "sparsities": (0.8, 0.9, 0.99), "batches": BATCHES}
RUNS = {"preset": "paper", "partition": "iid", "seed": 0, "weight_decay": 5e-4, "validation": 0.0}


def masked(case: dict, sparsities: tuple[float, ...]) -> Iterator[tuple[str, Config, torch.Tensor | None]]:
    """(name, configuration, mask) of the models of a case: None stands for a random ERK mask."""
    name = model_name(Config(**case))
    for sparsity in sparsities:
        ends = {"initial_sparsity": sparsity, "target_sparsity": sparsity}
        yield name, Config(method="feddip", method_options={"erk": "shared"}, **ends, **case), None
    runs = recorded("lite", method="feddip", **RUNS, **case)
    for _, run in runs[runs["label"] == "FedDIP"].drop_duplicates("run_id").sort_values("target_sparsity").iterrows():
        mask = read_mask(ROOT / "results" / "lite", run["run_id"])
        if mask is not None:
            yield f"{name}, FedDIP's masks", Config(target_sparsity=run["target_sparsity"], **case), mask


def measure(cases: tuple[dict, ...], how: dict) -> dict[str, list]:
    """The rows of all `cases`, under the names of the record."""
    rows = {"clients": [], "layers": [], "models": [], "times": []}
    for case in cases:
        name, shape = model_name(Config(**case)), {key: case[key] for key in ("model", "width") if key in case}
        forms = [{**form, **shape} for form in CLIENTS]
        rows["clients"] += client_rows(forms, how["client_turns"], how["client_samples"])
        (outputs, inputs), layers = largest_linear(Config(**case)), []
        for batch in how["batches"]:
            each = layer_rows(outputs, inputs, batch, how["sparsities"], how["repeats"])
            layers += [{"model": name, "layer": f"{inputs} to {outputs}", "batch": batch, **row} for row in each]
        rows["layers"] += layers
        for own, config, mask in masked(case, how["sparsities"]):
            state, data = untouched(config, mask)
            about = {"model": own, "target": config.target_sparsity}
            rows["models"] += [{**about, **sizes(state, data, config)}]
            times = inference_rows(sparse_model(state, data, config), data, layers, how["batches"], how["repeats"])
            rows["times"] += [{"model": own, "sparsity": config.target_sparsity, **row} for row in times]
            print(rows["models"][-1], flush=True)
    return rows


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rehearse", action="store_true", help="few sparsities and repeats; the record says so")
    parser.add_argument("--models", type=int, default=len(MODELS), help="only the first so many")


def record(given: argparse.Namespace) -> dict:
    how, models = REHEARSAL if given.rehearse else FULL, MODELS[: given.models]
    torch.set_num_threads(1)
    load, begin = os.getloadavg()[0], time.monotonic()
    rows = measure(models, how)
    loads = {"before": load, "after": os.getloadavg()[0]}
    settings = {**how, "models": [asdict(Config(**case)) for case in models]}
    facts = provenance(torch.device("cpu"), 1, load=loads, rehearsal=given.rehearse, seconds=time.monotonic() - begin)
    return {"settings": settings, **rows, "provenance": facts}
