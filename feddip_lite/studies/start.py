"""What the start of FedDIP is worth: round 0 dense, or under one of several masks (docs/deviations.md D7).

Results come as `records.names.describe` returns them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from ..records.store import headline
from ..report import style
from ..report.style import VERMILION, styled
from .sparsity_sweep import DECAY, at_home

STARTS = {
    "per_client": "each client's random mask", "none": "dense in round 0", "magnitude": "magnitude mask",
    "shared": "shared random mask",
}  # fmt: skip
UNPRUNED = "nothing pruned at first (s = 0)"
OTHERS = ("FedAvg", "FedSparsify-Global")


def starts(results: pd.DataFrame) -> pd.DataFrame:
    """A row per run of one model, data set and partition, in the setting of most FedDIP runs and at the target sparsity
    of most that differ in nothing but their start: these, `start` in words, and OTHERS under their names."""
    runs = headline(at_home(results))
    if runs.empty:
        return runs.assign(start="")
    runs = runs[(runs["weight_decay"] == DECAY) & (runs["preset"] == "paper")]
    own = runs[(runs["method"] == "feddip") & runs["changed"].isin(["", "erk", "initial_sparsity"])]
    usual = own["target_sparsity"].mode().head(1)
    own, others = (rows[rows["target_sparsity"].isin(usual)] for rows in (own, runs[runs["label"].isin(OTHERS)]))
    return pd.concat(
        [own.assign(start=[_start(run) for _, run in own.iterrows()]), others.assign(start=others["label"])]
    )


def _start(run: pd.Series) -> str:
    return STARTS[json.loads(run["method_options"])["erk"]] if run["initial_sparsity"] else UNPRUNED


@styled
def by_start(sources: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """Final accuracy by start, a panel per source of `starts`, a point per seed."""
    figure, axes = style.grid(1, len(sources), 3.2)
    for panel, (name, rows) in zip(axes[0], sources.items(), strict=True):
        order = [start for start in [*OTHERS, UNPRUNED, *STARTS.values()] if start in set(rows["start"])]
        look = {"runs": {"color": VERMILION, "marker": "D"}}
        style.over_seeds(rows.assign(name="runs"), "accuracy", "start", look, panel, order=order)
        panel.set(xlabel="final test accuracy", ylabel="")
        panel.set_title(name, loc="left")
    style.headed(figure, title, "bars: 95 % intervals over seeds, where there are three")
    return figure
