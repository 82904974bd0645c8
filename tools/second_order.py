"""Compare magnitude with the loss's second order at the models that recorded runs left: `python tools/second_order.py`

Reads results/lite (the runs of LeNet-5 on even data: FedDP, and FedDIP at every strength of its penalty), needs
Fashion-MNIST ($FEDDIP_DATA), and writes benchmarks/second_order.json.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from feddip_lite.core.errors import guarded
from feddip_lite.data.datasets import load_dataset
from feddip_lite.records.catalogue import data_root, recorded
from feddip_lite.records.provenance import provenance
from feddip_lite.records.store import ROOT, atomic_write, plain, read_model
from feddip_lite.studies.ingredients import by_sparsity
from feddip_lite.studies.second_order import RECORD, agreement, diagonals

WANTED = {"model": "lenet5", "dataset": "fashionmnist", "partition": "iid", "method": ["feddp", "feddip"]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000, metavar="N", help="training images, in two halves")
    given = parser.parse_args(arguments)
    status, line = guarded(lambda: record(ROOT / "results", ROOT / "benchmarks", given.samples))
    if line:
        print(f"tools/second_order.py: {line}", file=sys.stderr)
    return status


def record(folder: Path, to: Path, samples: int) -> int:
    """Measure every run below `folder`, and write the record into `to`. Runs whose models are not there are named."""
    torch.set_num_threads(1)
    data, rows, runs = load_dataset(WANTED["dataset"], data_root()), [], by_sparsity(recorded("lite", folder, **WANTED))
    for run in runs[runs["preset"] == "paper"].to_dict("records"):
        if set(run["changed"].split(", ")) - {"", "penalty_max"} or run["target_sparsity"] not in (0.9, 0.98):
            continue
        try:
            kept = read_model(folder / "lite", run["run_id"])
        except FileNotFoundError as error:
            print(error, file=sys.stderr)
            continue
        halves = diagonals(kept, run["model"], run["width"], data, samples, run["seed"])
        about = {name: run[name] for name in ("run_id", "label", "split", "seed", "target_sparsity")}
        peak = run["penalty_max"] if run["method"] == "feddip" else 0.0
        rows.append({**about, "penalty_max": peak, **agreement(kept.weights[: len(kept.mask)], halves)})
        print(rows[-1], flush=True)
    source = {"source": data.source, "variant": data.variant, "sha256": data.sha256}
    facts = provenance(torch.device("cpu"), 1, data=source, samples=samples)
    text = json.dumps(plain({"rows": rows, "provenance": facts}), indent=1, allow_nan=False)
    atomic_write(to / RECORD, text.encode() + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
