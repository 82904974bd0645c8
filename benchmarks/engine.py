"""Seconds per round of four ways to run it (contenders.py), side by side on this machine.

Each contender is a process of its own, so that none profits from another's settings; they take turns, round by round,
while the others wait. The engine keeps freed memory, which is a setting of the process: the floor is measured with
PyTorch's default and, as `d+`, with that setting.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time

import torch

from feddip_lite.config import Config
from feddip_lite.records.provenance import provenance
from feddip_lite.train import setup

from .contenders import CONTENDERS

FEDDIP = {"method": "feddip", "rounds": 200, "precision": "float32"}
_LARGE = {"a": 0, "b": 1, "c": 3, "d": 3, "d+": 3}
CASES = {
    "lenet5": ({"dataset": "fashionmnist", "model": "lenet5"}, dict.fromkeys(["a", "b", "c", "d", "d+"], 4)),
    "alexnet 0.25": ({"dataset": "cifar10", "model": "alexnet", "width": 0.25}, {**_LARGE, "a": 1}),
    "alexnet": ({"dataset": "cifar10", "model": "alexnet", "local_epochs": 2}, _LARGE),
    "resnet18 0.25": ({"dataset": "cifar100", "model": "resnet18", "width": 0.25, "local_epochs": 2}, _LARGE),
    "resnet18": ({"dataset": "cifar100", "model": "resnet18", "local_epochs": 2}, _LARGE),
}
"""Name: (settings, counted rounds of each contender). A first round does not count, unless it is the only one: 0, for
a, which takes minutes a round there. The largest run two local epochs, not five (one would leave a core idle: five
clients, two cores)."""
NEEDS_GPU = {"resnet18"}


def contender(name: str, config: Config, pipe) -> None:
    """A process: a round for every line read, answered by (seconds of training, of evaluation, peak MB)."""
    if name in "abd":
        setup.keep_freed_memory = lambda: None
    it = CONTENDERS[name[0]](config)
    cuda = config.device.startswith("cuda")

    def seconds(job) -> float:
        start = time.perf_counter()
        job()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    while pipe.recv():
        times = seconds(it.train), seconds(it.evaluate)
        peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else _peak_megabytes()
        pipe.send((*times, peak))


def _peak_megabytes() -> float:
    """Of this process and the largest of its own (a's DataLoader workers), in MiB."""
    return sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024


def measure(config: Config, counted: dict[str, int]) -> dict[str, dict]:
    """The seconds per round and peak memory of each contender, over its number of counted rounds, taking turns."""
    context = multiprocessing.get_context("spawn")
    pipes, processes, rows = {}, [], {name: [] for name in counted}
    for name in counted:
        pipes[name], end = context.Pipe()
        processes.append(context.Process(target=contender, args=(name, config, end), daemon=name != "a"))
        processes[-1].start()
    for repeat in range(max(counted.values()) + 1):
        for name in [name for name, rounds in counted.items() if repeat <= rounds]:
            pipes[name].send(True)
            row = pipes[name].recv()
            if repeat or not counted[name]:
                rows[name].append(row)
            print(f"  {name:3s} round {repeat}: train {row[0]:7.3f} s, evaluate {row[1]:6.3f} s", flush=True)
    for pipe in pipes.values():
        pipe.send(False)
    for process in processes:
        process.join()
    return {name: _summary(rows[name]) for name in counted}


def _summary(rows: list[tuple]) -> dict:
    train, evaluate, peak = zip(*rows, strict=True)
    total = [a + b for a, b in zip(train, evaluate, strict=True)]

    def spread(values):
        return {"median": statistics.median(values), "min": min(values), "max": max(values)}

    return {"train_s": spread(train), "evaluate_s": spread(evaluate), "total_s": spread(total), "peak_mb": max(peak)}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated, of: " + ", ".join(CASES))
    parser.add_argument("--contenders", default="a,b,c,d,d+", help="comma-separated, of: a,b,c,d,d+")
    parser.add_argument("--repeats", type=int, help="counted rounds of each contender")
    parser.add_argument("--precision", default="float32", choices=["float32", "tf32", "bf16"])


def record(given: argparse.Namespace) -> dict:
    """The table of the cases asked for; one that needs a GPU is left out on a CPU, unless it is asked for by name."""
    table, everything = {}, given.cases == ",".join(CASES)
    for name in given.cases.split(","):
        if name in NEEDS_GPU and given.device == "cpu" and everything:
            continue
        settings, counted = CASES[name]
        counted = {way: given.repeats or counted[way] for way in given.contenders.split(",")}
        config = Config(**{**FEDDIP, **settings, "device": given.device, "precision": given.precision})
        print(f"{name}: {config.local_epochs} local epochs, {config.precision}", flush=True)
        table[name] = measure(config, counted)
        table[name]["settings"] = settings
    facts = provenance(torch.device(given.device), torch.get_num_threads(), precision=given.precision)
    return {"table": table, "provenance": facts}
