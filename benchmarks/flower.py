"""What Flower costs: seconds per round in one process and on its simulation, for messages of LeNet-5 and AlexNet.

FedAvg on digits, dense messages both ways, five clients per round with one local step each: what is compared is the
engine, not training.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from feddip_lite import Config
from feddip_lite.flower.parity import HERE
from feddip_lite.flower.processes import Federation
from feddip_lite.records.provenance import provenance
from feddip_lite.records.store import read_run
from feddip_lite.train.run import run

PLACES = (HERE, "simulation")
ONE_STEP_EACH = {"method": "fedavg", "dataset": "digits", "clients_per_round": 5, "local_epochs": 1, "device": "cpu"}


def measure(config: Config, place: str, folder: Path) -> dict:
    """Seconds per round after the first (which starts the clients' processes), and bytes of a message each way."""
    if place == HERE:
        run(config, results_dir=folder, progress=False)
    else:
        with Federation(folder / ".flower", config.clients, place) as federation:
            federation.wait(federation.submit(config, folder, checkpoint_every=config.rounds), 3600)
    history, _ = read_run(folder, config.run_id)
    seconds = history["seconds"][1:]
    sent = {name: int(history[name].iloc[-1]) // config.clients_per_round for name in ("up_bytes", "down_bytes")}
    spread = {"median": float(seconds.median()), "min": float(seconds.min()), "max": float(seconds.max())}
    return {"model": config.model, "place": place, "rounds": config.rounds, "seconds": spread, **sent}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=["lenet5", "alexnet"])
    parser.add_argument("--rounds", type=int, default=20, help="at least 2")
    parser.add_argument("--clients", type=int, default=50)


def record(given: argparse.Namespace) -> dict:
    rows = []
    for model in given.models:
        config = Config(model=model, rounds=given.rounds, clients=given.clients, **ONE_STEP_EACH)
        for place in PLACES:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(config, place, Path(folder)))
            print(json.dumps(rows[-1]), flush=True)
    return {"rows": rows, "provenance": provenance(torch.device("cpu"), torch.get_num_threads(), clients=given.clients)}
