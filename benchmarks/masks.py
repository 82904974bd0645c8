"""What it costs the server to choose a mask and to code it, at AlexNet's size.

A pruning event chooses the top of |w|, finds the indices of the kept weights and codes the mask for the download; it
happens every R = 5 rounds. Weights are those of an initialised AlexNet under a little noise.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from feddip_lite.config import Config
from feddip_lite.core.flat import Layout, kept_indices
from feddip_lite.core.message import Message, num_bytes
from feddip_lite.core.models import build_model
from feddip_lite.core.sparsity import num_kept, topk_mask
from feddip_lite.records.provenance import provenance
from feddip_lite.train.run import running

INTERVAL = 5  # rounds between pruning events (FedDIP's R)
SPARSITIES = (0.5, 0.8, 0.9, 0.95)


def event(scores: torch.Tensor, sparsity: float) -> dict[str, float]:
    """Seconds of one pruning event, step by step, and the bytes of the mask."""
    times = [time.perf_counter()]
    mask = topk_mask(scores, num_kept(sparsity, len(scores)))
    times.append(time.perf_counter())
    kept_indices(mask)
    times.append(time.perf_counter())
    size = num_bytes(Message(None, mask, {}))
    times.append(time.perf_counter())
    choose, index, code = (after - before for before, after in zip(times, times[1:], strict=False))
    return {"choose_s": choose, "index_s": index, "code_s": code, "mask_bytes": size}


def untrained(
    name: str = "alexnet", width: float = 1.0, channels: int = 3, size: int = 32
) -> tuple[Layout, torch.Tensor]:
    """A model's layout, and its initial weights, (n,), the prunable ones first; AlexNet's at full width."""
    module = build_model(name, classes=10, width=width, channels=channels, size=size, seed=0)
    layout = Layout.of(module, image_shape=(channels, size, size))
    parameters = {name: value.detach().flatten() for name, value in module.named_parameters()}
    return layout, torch.cat([parameters[slot.name] for slot in layout.slots])


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=5, help="events of each sparsity")


def record(given: argparse.Namespace) -> dict:
    (layout, weights), rows = untrained(), []
    weights = weights[: layout.prunable]
    draw = torch.Generator().manual_seed(1)
    with running(Config()):
        for sparsity in SPARSITIES:
            each = []
            for _ in range(given.repeats):
                noise = torch.randn(len(weights), generator=draw) * weights.std() / 10
                each.append(event((weights + noise).abs(), sparsity))
            row = {name: statistics.median(one[name] for one in each) for name in each[0]}
            total = row["choose_s"] + row["index_s"] + row["code_s"]
            rows.append({"prunable": layout.prunable, "sparsity": sparsity, **row, "per_round_s": total / INTERVAL})
            print(rows[-1], flush=True)
    return {"rows": rows, "provenance": provenance(torch.device("cpu"), 1)}
