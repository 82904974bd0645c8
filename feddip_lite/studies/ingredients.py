"""Which part of FedDIP does anything: feedback and penalty crossed; what returns, for how long, and where it begins.

Results come as `records.names.describe` returns them. Read before: `sparsity_sweep.py`.
"""

from __future__ import annotations

import json
from math import isclose

import pandas as pd
from matplotlib.figure import Figure

from ..core.schedules import penalty_at
from ..records.names import splits
from ..report import style
from ..report.statistics import summaries
from ..report.style import BLUE, GREEN, INK, ORANGE, VERMILION, styled
from .sparsity_sweep import DECAY, at_home

FEEDBACK = ("none", "within a round", "at the server")
PENALTIES = ("none", "constant", "growing")
"""The constant one has the same mean over all rounds as the growing one."""
REENTRY = ("no memory", "memory", "clipped", "zero")
_VARIED = {"", "feedback", "reentry", "lambda_schedule", "penalty_max"}
_PENALTY_LOOKS = dict(zip(PENALTIES, ((INK, "o"), (ORANGE, "s"), (VERMILION, "D")), strict=True))
_SPLIT_LOOKS = (BLUE, "o"), (GREEN, "^")


def by_sparsity(results: pd.DataFrame) -> pd.DataFrame:
    """The runs of all methods and of every variant of FedDIP, one row each as `summaries` has them, that share the
    setting of most FedDIP runs of their partition but for the target sparsity: `split` names that, too."""
    found = []
    for split in splits(results):
        runs = summaries(at_home(results[results["split"] == split]))
        runs = runs[runs["weight_decay"] == DECAY].reset_index()
        where = "" if split == "IID" else f", {split}"
        found.append(runs.assign(partition=split, split=[f"s = {s:g}{where}" for s in runs["target_sparsity"]]))
    return pd.concat(found, ignore_index=True) if found else results


def ingredients(results: pd.DataFrame) -> pd.DataFrame:
    """Those of `by_sparsity` that are FedDP or FedDIP with nothing changed but these, where feedback was varied at that
    target sparsity: `fed_back` says where pruned weights' steps go on, one of FEEDBACK; `penalised` which of PENALTIES;
    `begins` where a returning weight begins, one of REENTRY."""
    runs = by_sparsity(results)
    if runs.empty:
        return runs.assign(fed_back="", penalised="", begins="")
    varied = runs["changed"].map(lambda words: set(words.split(", ")) <= _VARIED)
    runs = runs[runs["method"].isin(["feddp", "feddip"]) & runs["preset"].isin(["paper", "memory"]) & varied]
    options = [json.loads(text) for text in runs["method_options"]]
    runs = runs.assign(
        fed_back=[_feedback(each) for each in options],
        penalised=[_penalty(run, each) for (_, run), each in zip(runs.iterrows(), options, strict=True)],
        begins=[each["reentry"] if each["server_memory"] else REENTRY[0] for each in options],
    )
    runs = runs[runs["penalised"] != ""]
    return runs[runs.groupby("target_sparsity")["fed_back"].transform("nunique") > 1]


def _feedback(options: dict) -> str:
    return FEEDBACK[0] if options["feedback"] == "none" else FEEDBACK[1 + options["server_memory"]]


def _penalty(run: pd.Series, options: dict) -> str:
    """Which of PENALTIES; empty for one of another strength."""
    if run["method"] == "feddp":
        return "none"
    peak, rounds = type(run["penalty_max"])(1e-3), int(run["rounds"])
    mean = sum(penalty_at(t, peak, int(run["penalty_steps"]), rounds) for t in range(rounds)) / rounds
    expected = {"eq3": ("growing", peak), "constant": ("constant", mean)}
    name, strength = expected.get(options["lambda_schedule"], ("", 0.0))
    return name if isclose(run["penalty_max"], strength, rel_tol=1e-6) else ""


@styled
def crossed(runs: pd.DataFrame, title: str) -> Figure:
    """Final accuracy, a column per target sparsity. Above: by feedback, a line per penalty, IID. Below: under the
    growing penalty, by where a returning weight begins, a line per partition."""
    targets = sorted(runs["target_sparsity"].unique())
    figure, axes = style.grid(2, len(targets), 3.0)
    looks = {f"penalty: {name}": {"color": c, "marker": m} for name, (c, m) in _PENALTY_LOOKS.items()}
    names = splits(runs.assign(split=runs["partition"]))
    split_looks = {name: {"color": c, "marker": m} for name, (c, m) in zip(names, _SPLIT_LOOKS, strict=False)}
    even = runs[(runs["partition"] == "IID") & runs["begins"].isin(REENTRY[:2])]
    upper = even.assign(name="penalty: " + even["penalised"])
    fed = runs[(runs["penalised"] == "growing") & (runs["fed_back"] != "none")]
    lower = fed.assign(name=fed["partition"])
    for column, target in enumerate(targets):
        for panel, rows, x, order, own in (
            (axes[0][column], upper, "fed_back", FEEDBACK, looks),
            (axes[1][column], lower, "begins", REENTRY, split_looks),
        ):
            style.over_seeds(rows[rows["target_sparsity"] == target], x, "accuracy", own, panel, order=order)
            panel.set_title(f"s = {target:g}", loc="left")
        axes[0][column].set(xlabel="error feedback", ylabel="final test accuracy")
        axes[1][column].set(xlabel="a weight that returns begins at", ylabel="final test accuracy")
    style.legend(figure, looks | split_looks)
    words = runs["setting"].iloc[0].split(", ")
    style.headed(figure, title, f"{', '.join(words[:4])}; bars: 95 % intervals over seeds")
    return figure
