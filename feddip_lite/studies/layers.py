"""What is left of a pruned model: its sparsity layer by layer, and how alike the masks of two runs are.

Read from the `layers` and masks that runs record (`results.save_run`); runs that are older than these have none.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from math import prod
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from ..core.sparsity import erk_densities, jaccard
from ..records.catalogue import RECORDED, main_runs, recorded
from ..records.names import labels
from ..records.store import read_mask, read_run
from ..report import style
from ..report.style import INK, counted, styled
from .sparsity_sweep import recorded_sweep

RUN_COLUMNS = ("run_id", "label", "method", "preset", "changed", "split", "setting", "seed", "target_sparsity")
LAYER = ("layer", "shape", "size", "kept", "sparsity", "erk")
"""What `layers` adds: a prunable tensor's name, shape and number of weights, how many are kept, the share that is zero,
and the sparsity that ERK gives this tensor for the same total."""


_ALIKE = ("setting", "split", "label", "target_sparsity")  # what two runs share that only their seeds tell apart


def layers(folder: Path, runs: pd.DataFrame) -> pd.DataFrame:
    """A row per recorded sparse run and prunable tensor, in the model's order: RUN_COLUMNS and LAYER."""
    rows = []
    for run in runs.drop_duplicates("run_id").to_dict("records"):
        found = read_run(folder, run["run_id"])[1].get("layers") or []
        sizes, kept = [prod(layer["shape"]) for layer in found], [layer["kept"] for layer in found]
        if sum(kept) == sum(sizes):
            continue
        densities = erk_densities([tuple(layer["shape"]) for layer in found], sum(kept) / sum(sizes))
        for layer, size, density in zip(found, sizes, densities, strict=True):
            name = layer["name"].removesuffix(".weight")
            values = (name, tuple(layer["shape"]), size, layer["kept"], 1 - layer["kept"] / size, 1 - density)
            rows.append({column: run[column] for column in RUN_COLUMNS} | dict(zip(LAYER, values, strict=True)))
    return pd.DataFrame(rows, columns=[*RUN_COLUMNS, *LAYER])


def recorded_layers(folder: Path) -> dict[str, pd.DataFrame]:
    """`layers` of the runs recorded under `folder`, by a name for each setting: the main comparisons under IID, each
    method with its own settings, and the two ends of LeNet-5's sweep, whose runs at 0.9 are older than layers."""
    groups = {}
    for profile in RECORDED:
        for name, runs in main_runs(profile, folder).items():
            groups[f"{name}_{profile}_layers"] = profile, runs[(runs["split"] == "IID") & (runs["preset"] == "paper")]
    swept = recorded_sweep(recorded("lite", folder, model="lenet5", dataset="fashionmnist", partition="iid"))
    for target in swept["target_sparsity"].agg(["min", "max"]).dropna().unique():
        own = swept[swept["target_sparsity"] == target]
        groups[f"lenet5_fashionmnist_lite_layers_{target:g}"] = "lite", own
    found = {name: layers(folder / profile, runs[runs["changed"] == ""]) for name, (profile, runs) in groups.items()}
    return {name: rows for name, rows in found.items() if len(rows)}


@styled
def layer_bars(rows: pd.DataFrame, title: str) -> Figure:
    """What is left of every prunable tensor, in percent on a logarithmic axis: a point per seed, the mean of each
    method, its 95 % interval where there are three seeds, and ERK's share of the same total; for one setting and
    partition."""
    looks = {label: style.look_of(rows[rows["label"] == label]) for label in labels(rows)}
    seeds = rows.groupby("label")["seed"].nunique()
    data = rows.assign(name=rows["label"], density=100 * (1 - rows["sparsity"]), erk=100 * (1 - rows["erk"]))
    order = list(dict.fromkeys(rows["layer"]))
    figure, axes = style.grid(1, 1, 3.2)
    panel = axes[0][0]
    style.over_seeds(data, "layer", "density", looks, panel, order=order)
    panel.set(yscale="log", xlabel="", ylabel="weights kept [%], log")  # now, or means would be geometric
    panel.plot(order, data.groupby("layer")["erk"].mean()[order], "_", color=INK, markersize=22)
    panel.tick_params(axis="x", rotation=60 if len(order) > 6 else 0)
    panel.margins(y=0.12)
    style.log_ticks(panel.yaxis)
    looks = {counted(name, [seeds[name]]): look for name, look in looks.items()}
    erk = {"color": INK, "marker": "_", "markeredgecolor": INK, "markersize": 14, "ls": "none"}
    style.legend(figure, looks | {"ERK, same total": erk})
    style.headed(figure, f"{title}; {rows['split'].iloc[0]}", rows["setting"].iloc[0])
    return figure


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
