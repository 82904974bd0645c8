"""What pruning saves, measured on this machine: `python benchmarks/cost.py [--write] [--rehearse]`.

* clients: seconds and peak memory of local training, each in a process of its own: dense, FedDIP, masked SGD.
* layers: each model's largest linear layer, dense and CSR, over sparsities.
* models: FedDIP trained briefly to each target sparsity, weighed and timed: dense, CSR, without dead channels.

One thread. `--write` records benchmarks/cost_cpu.json, from which notebook 09, a table of the README and two claims are
made; it also records the machine's load before and after, which should be below 1. Real data: Fashion-MNIST, CIFAR-10
and CIFAR-100. `--rehearse` takes digits and next to no rounds and repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from feddip_lite.config import Config
from feddip_lite.cost_runs import CLIENTS, client_rows, inference, layer_rows, model_name
from feddip_lite.models import INPUT_SHAPES, build_model
from feddip_lite.results import plain, provenance

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
BATCHES = (1, 128)
MODELS = (  # rounds and epochs make pruned models whose accuracy is still rising; what is timed is their structure
    {"dataset": "fashionmnist", "model": "lenet5", "rounds": 40},
    {"dataset": "cifar10", "model": "alexnet", "width": 0.25, "rounds": 40, "local_epochs": 2},
    {"dataset": "cifar100", "model": "resnet18", "width": 0.25, "rounds": 20, "local_epochs": 1},
)
SETTINGS = {"client_turns": 5, "client_samples": 1200, "repeats": 101, "sparsities": SPARSITIES, "batches": BATCHES}
REHEARSAL = {
    "client_turns": 3,
    "client_samples": 128,
    "repeats": 9,
    "sparsities": (0.8, 0.95, 0.99),
    "batches": BATCHES,
}


def largest_linear(settings: dict) -> tuple[int, int]:
    """(outputs, inputs) of the linear layer with most weights."""
    config = Config(**settings)
    channels, size = INPUT_SHAPES.get(config.model, (1, 28))
    classes = 100 if config.dataset == "cifar100" else 10
    module = build_model(config.model, classes=classes, width=config.width, channels=channels, size=size)
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return tuple(max(layers, key=lambda layer: layer.weight.numel()).weight.shape)


def measure(cases: tuple[dict, ...], how: dict) -> dict[str, list]:
    """The rows of all `cases`, under the names of the record."""
    rows = {"clients": [], "layers": [], "models": [], "times": []}
    for case in cases:
        shape = {name: case[name] for name in ("model", "width") if name in case}
        rows["clients"] += client_rows(
            [{**form, **shape} for form in CLIENTS], how["client_turns"], how["client_samples"]
        )
        name, (outputs, inputs), layers = model_name(Config(**case)), largest_linear(case), []
        for batch in how["batches"]:
            each = layer_rows(outputs, inputs, batch, how["sparsities"], how["repeats"])
            layers += [{"model": name, "layer": f"{inputs} to {outputs}", "batch": batch, **row} for row in each]
        rows["layers"] += layers
        for sparsity in how["sparsities"]:
            config = Config(method="feddip", target_sparsity=sparsity, **case)
            config = replace(config, lr_decay=0.998 ** (1000 / config.rounds))
            weighed, times = inference(config, layers, how["batches"], how["repeats"])
            rows["models"] += [{"model": name, **weighed}]
            rows["times"] += [{"model": name, **row} for row in times]
            print({"model": name, **weighed}, flush=True)
    return rows


def main() -> None:
    """Measure everything, print, and record it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="record benchmarks/cost_cpu.json")
    parser.add_argument("--rehearse", action="store_true", help="digits, few rounds: minutes instead of half an hour")
    given = parser.parse_args()
    small = {"dataset": "digits", "rounds": 3, "clients": 5, "local_epochs": 1} if given.rehearse else {}
    cases, how = tuple({**case, **small} for case in MODELS), REHEARSAL if given.rehearse else SETTINGS
    torch.set_num_threads(1)
    load, begin = os.getloadavg()[0], time.monotonic()
    rows = measure(cases, how)
    loads = {"before": load, "after": os.getloadavg()[0]}
    settings = {**how, "models": [asdict(Config(method="feddip", **case).resolved()) for case in cases]}
    facts = provenance(torch.device("cpu"), 1, load=loads, rehearsal=given.rehearse, seconds=time.monotonic() - begin)
    text = json.dumps(plain({"settings": settings, **rows, "provenance": facts}), indent=1)
    print(json.dumps(plain(facts)))
    if given.write:
        (Path(__file__).parent / "cost_cpu.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
