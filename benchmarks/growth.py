"""How cost grows: seconds with clients per round and local epochs, memory and start-up with the number of clients.

Every row is measured in a process of its own, LeNet-5 on Fashion-MNIST, FedDIP.
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
from feddip_lite.train.evaluate import evaluate_state
from feddip_lite.train.round import run_round
from feddip_lite.train.run import running
from feddip_lite.train.setup import prepare

MEMORY = [{"clients": clients} for clients in (10, 50, 500, 5000, 20_000, 60_000)]
TIME = [{"clients_per_round": clients} for clients in (5, 10, 20)] + [{"local_epochs": n} for n in (1, 2, 10)]


def measure(settings: dict) -> dict:
    """Start-up, median seconds of training per round over five rounds after the first, steps per round, peak MiB."""
    config = Config(method="feddip", dataset="fashionmnist", rounds=200, device="cpu", **settings).resolved()
    start = time.perf_counter()
    state, clients, method = prepare(config)
    ready, seconds = time.perf_counter() - start, []
    with running(config):
        for _ in range(6):
            begin = time.perf_counter()
            state, _ = run_round(state, clients, method, config)
            seconds.append(time.perf_counter() - begin)
            evaluate_state(state, clients)
    clients.workers.close()
    batches = -(-len(clients.train[0]) // config.batch_size)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    steps = batches * config.local_epochs * config.clients_per_round
    return {"start_s": ready, "train_s": statistics.median(seconds[1:]), "steps": steps, "peak_mb": peak}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=len(MEMORY + TIME), help="only the first so many")


def record(given: argparse.Namespace) -> dict:
    rows, settings = [], (MEMORY + TIME)[: given.rows]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # a new process for each row
        for its, found in zip(settings, pool.imap(measure, settings), strict=True):
            rows.append({**its, **found})
            print(rows[-1], flush=True)
    return {"rows": rows, "provenance": provenance(torch.device("cpu"), torch.get_num_threads())}
