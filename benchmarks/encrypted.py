"""What pruning saves a round under encryption: seconds and bytes to encrypt, add and decrypt, by how much is kept.

Five clients' weights are an initialised model's under a little noise; the mask keeps the largest of the prunable ones,
and what is never pruned is sent whole. One thread. Needs the extra `feddip-lite[encrypted]`.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from feddip_lite.config import Config
from feddip_lite.core.sparsity import num_kept, topk_mask
from feddip_lite.records.provenance import provenance
from feddip_lite.studies.encrypted import encrypted_mean
from feddip_lite.train.run import running

from .masks import untrained

MODELS = {
    "LeNet-5": {"name": "lenet5", "channels": 1, "size": 28},
    "AlexNet (0.25)": {"name": "alexnet", "width": 0.25},
}
SPARSITIES = (0.0, 0.5, 0.9, 0.95)
CLIENTS = 5


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=5, help="of each model and sparsity")


def record(given: argparse.Namespace) -> dict:
    rows = []
    with running(Config()):
        for title, shape in MODELS.items():
            layout, initial = untrained(**shape)
            weights = initial.double().numpy()
            for repeat in range(given.repeats):
                for sparsity in SPARSITIES:
                    rows.append({"split": title, "seed": repeat, **one(weights, layout.prunable, sparsity, repeat)})
                    print(rows[-1], flush=True)
    return {"rows": rows, "provenance": {**provenance(torch.device("cpu"), 1), "clients": CLIENTS}}


def one(weights: np.ndarray, prunable: int, sparsity: float, seed: int) -> dict:
    """A row: the round's clients, what they send, how long it took, and how far the mean is from the plain one."""
    draw = np.random.default_rng(seed)
    kept = np.ones(len(weights), dtype=bool)
    kept[:prunable] = topk_mask(torch.from_numpy(np.abs(weights[:prunable])), num_kept(sparsity, prunable)).numpy()
    clients = [weights[kept] + draw.normal(0, weights.std() / 10, kept.sum()) for _ in range(CLIENTS)]
    sizes = draw.integers(100, 2000, CLIENTS)
    mean, taken = encrypted_mean(clients, sizes)
    error = np.abs(mean - np.average(clients, axis=0, weights=sizes)).max()
    label = f"{1 - sparsity:.0%} kept" if sparsity else "dense"
    return {
        "label": label,
        "numbers": int(kept.sum()),
        "plain_bytes": 4 * int(kept.sum()),
        **taken,
        "error": float(error),
    }
