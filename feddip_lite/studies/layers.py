"""What is left of a pruned model: its sparsity layer by layer, and how alike the masks of two runs are.

Read from the `layers` and masks that runs record (`results.save_run`); runs that are older than these have none.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from math import prod
from pathlib import Path

import pandas as pd
from torch import Tensor

from ..core.sparsity import jaccard
from ..records.store import read_mask, read_run

_ALIKE = ("setting", "split", "label", "target_sparsity")  # what two runs share that only their seeds tell apart


def overlap_by_chance(kept: list[int], others: list[int], sizes: list[int]) -> float:
    """The Jaccard overlap expected of two masks with these counts per tensor, placed at random within each tensor:
    the ratio of the expected sizes of their intersection and union; 1 if both are empty."""
    both = sum(a * b / size for a, b, size in zip(kept, others, sizes, strict=True))
    union = sum(kept) + sum(others) - both
    return both / union if union else 1.0


def across_seeds(folder: Path, runs: pd.DataFrame) -> pd.DataFrame:
    """How alike the last masks of one method are under two seeds: a row per setting, partition, method, target
    sparsity, pair of seeds and tensor ("all" for the whole mask), with `overlap` (Jaccard) and `chance`, that of masks
    placed at random with the same counts per tensor. Runs without a recorded mask, or with a full one, are left out."""
    rows = []
    for values, own in runs.drop_duplicates("run_id").groupby(list(_ALIKE), sort=False):
        found = {run.seed: (read_mask(folder, run.run_id), run.run_id) for run in own.itertuples()}
        masks = {seed: mask for seed, (mask, _) in sorted(found.items()) if mask is not None and not mask.all()}
        for one, other in combinations(masks, 2):
            tensors = read_run(folder, found[one][1])[1]["layers"]
            row = dict(zip(_ALIKE, values, strict=True)) | {"seeds": f"{one}, {other}"}
            rows += [row | overlap for overlap in _overlaps(masks[one], masks[other], tensors)]
    return pd.DataFrame(rows, columns=[*_ALIKE, "seeds", "layer", "overlap", "chance"])


def _overlaps(mask: Tensor, other: Tensor, tensors: list[dict]) -> Iterator[dict]:
    sizes = [prod(tensor["shape"]) for tensor in tensors]
    parts = list(zip(mask.split(sizes), other.split(sizes), strict=True))
    counts = [[int(part.sum()) for part in each] for each in zip(*parts, strict=True)]
    yield {"layer": "all", "overlap": jaccard(mask, other), "chance": overlap_by_chance(*counts, sizes)}
    for tensor, (a, b), size in zip(tensors, parts, sizes, strict=True):
        chance = overlap_by_chance([int(a.sum())], [int(b.sum())], [size])
        yield {"layer": tensor["name"].removesuffix(".weight"), "overlap": jaccard(a, b), "chance": chance}
