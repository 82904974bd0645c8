"""What training in bfloat16 gains: seconds of a client's local training in float32 and in bf16, in turns.

FedDIP, one client of 500 images a round, one epoch, one thread. What it costs in accuracy is recorded in
`results/precision/` (params/precision.yaml).
"""

from __future__ import annotations

import argparse
import time

import torch

from feddip_lite.config import Config
from feddip_lite.records.provenance import provenance
from feddip_lite.train.round import run_round
from feddip_lite.train.run import running
from feddip_lite.train.setup import prepare

MODELS = (
    {"model": "lenet5", "dataset": "fashionmnist", "clients": 120},
    {"model": "alexnet", "dataset": "cifar10", "width": 0.25, "clients": 100},
    {"model": "alexnet", "dataset": "cifar10", "clients": 100},
    {"model": "resnet18", "dataset": "cifar100", "width": 0.25, "clients": 100},
    {"model": "resnet18", "dataset": "cifar100", "clients": 100},
)
PRECISIONS = ("float32", "bf16")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--turns", type=int, default=5, help="rounds of each precision, after one that is not counted")
    parser.add_argument("--models", type=int, nargs="*", default=range(len(MODELS)), help="numbers in MODELS")


def record(given: argparse.Namespace) -> dict:
    rows = []
    for case in (MODELS[number] for number in given.models):
        rows += turns(case, given.turns)
        print(rows[-2], rows[-1], sep="\n", flush=True)
    return {"rows": rows, "provenance": provenance(torch.device("cpu"), 1)}


def turns(case: dict, count: int) -> list[dict]:
    """A row per precision: `train_s` of `count` rounds after the first."""
    small = {"clients_per_round": 1, "local_epochs": 1, "rounds": 100, "device": "cpu", "workers": 1}
    configs = [Config(method="feddip", precision=name, **small, **case).resolved() for name in PRECISIONS]
    ready = [prepare(config) for config in configs]
    states, seconds = [state for state, _, _ in ready], [[] for _ in configs]
    for _ in range(count + 1):
        for place, (config, (_, clients, method)) in enumerate(zip(configs, ready, strict=True)):
            with running(config):
                begin = time.perf_counter()
                states[place], _ = run_round(states[place], clients, method, config)
                seconds[place].append(time.perf_counter() - begin)
    for _, clients, _ in ready:
        clients.workers.close()
    samples = len(ready[0][1].train[0])
    shown = {"model": case["model"], "width": case.get("width", 1.0), "samples": samples}
    return [{**shown, "precision": name, "train_s": own[1:]} for name, own in zip(PRECISIONS, seconds, strict=True)]
