"""How cost grows: seconds with clients per round and local epochs, memory and start-up with the number of clients.

    python benchmarks/growth.py [--write]

Every row is measured in a process of its own, LeNet-5 on Fashion-MNIST, FedDIP. `--write` records
benchmarks/growth_cpu.json, from which the README's lines are made.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
MEMORY = [{"clients": clients} for clients in (10, 50, 500, 5000)]
TIME = [{"clients_per_round": clients} for clients in (5, 10, 20)] + [{"local_epochs": n} for n in (1, 2, 10)]


def measure(settings: dict) -> dict:
    """Start-up, median seconds of training per round over five rounds after the first, steps per round, peak MiB."""
    from feddip_lite.config import Config
    from feddip_lite.train.evaluate import evaluate_state
    from feddip_lite.train.round import run_round
    from feddip_lite.train.run import running
    from feddip_lite.train.setup import prepare

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


def main() -> None:
    """Measure every row, print and record the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="record benchmarks/growth_cpu.json")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        print(json.dumps(measure(json.loads(given.row))))
        return
    rows = []
    for settings in MEMORY + TIME:
        command = [sys.executable, __file__, "--row", json.dumps(settings)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append({**settings, **json.loads(done.stdout.splitlines()[-1])})
        print(rows[-1], flush=True)
    if given.write:
        import torch

        from feddip_lite.records.provenance import provenance

        facts = provenance(torch.device("cpu"), torch.get_num_threads())
        text = json.dumps({"rows": rows, "provenance": facts}, indent=1)
        (HERE / "growth_cpu.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
