"""Accuracy as sparsity goes to the extreme, and what FedDIP's own settings are worth: tables and figures.

The question is FedDIP minus FedDP, the same run without the penalty, paired by seed. Results come as
`records.names.describe` returns them; statistics are those of `report/statistics.py`.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..config import Config
from ..records.catalogue import own_start, shared_start
from ..records.names import NAMES, SHARED, SHARED_START, SPLIT, labels
from ..records.store import headline
from ..report import style
from ..report.statistics import paired
from ..report.style import INK, counted, styled

_SHARED = [*SPLIT, *(name for name in SHARED if name not in ("target_sparsity", "weight_decay"))]
DECAY = Config().weight_decay
DENSE = NAMES["fedavg"]


def sparsity_sweep(results: pd.DataFrame) -> pd.DataFrame:
    """The runs, one row each as `headline` has them, that differ from the usual FedDIP run in target sparsity, method
    and seed alone; methods with a single target sparsity are left out. FedAvg has none: it stands at every sparsity."""
    runs = headline(at_home(results))
    runs = runs[(runs["changed"] == "") & (runs["preset"] == "paper") & (runs["weight_decay"] == DECAY)]
    targets = runs.groupby("method")["target_sparsity"].nunique()
    swept = runs[runs["method"].isin(targets.index[targets > 1])]
    dense = runs[runs["label"] == DENSE].drop(columns="target_sparsity")
    return pd.concat([swept, dense.merge(swept[["target_sparsity"]].drop_duplicates(), how="cross")])


def recorded_sweep(results: pd.DataFrame) -> pd.DataFrame:
    """`sparsity_sweep` of recorded runs; of `shared_start` while FedDIP was recorded with it at more sparsities."""
    swept = [sparsity_sweep(results), sparsity_sweep(shared_start(results))]
    return max(swept, key=lambda runs: runs.loc[runs["label"] == "FedDIP", "target_sparsity"].nunique())


def gains(runs: pd.DataFrame) -> dict[float, np.ndarray]:
    """Target sparsity -> FedDIP minus FedDP in final accuracy, (n,), over the seeds that have both."""
    found = {sparsity: paired(group, "FedDIP", "FedDP") for sparsity, group in runs.groupby("target_sparsity")}
    return {sparsity: values for sparsity, values in found.items() if len(values)}


def ablations(results: pd.DataFrame) -> pd.DataFrame:
    """The runs of FedDIP and FedDP, one row each, with a column `variant`: what was changed of FedDIP. FedDP is FedDIP
    without its penalty; runs without weight decay are there with and without it. Of the shared random start (D7) there
    is FedDIP alone, since all else would be two changes. None if FedDIP itself is missing."""
    runs = headline(at_home(results))
    runs = runs[runs["method"].isin(["feddp", "feddip"]) & (runs["changed"] != "upload")]
    alone = (runs["method"] == "feddip") & (runs["preset"] == "paper") & runs["changed"].isin(["erk", "erk, erk_over"])
    runs = pd.concat([own_start(runs), runs[alone]])
    runs = runs.assign(variant=[_variant(run) for _, run in runs.iterrows()])
    return runs if "FedDIP" in set(runs["variant"]) else runs.iloc[:0]


@styled
def sweep(runs: pd.DataFrame, title: str) -> Figure:
    """Left: final accuracy at each target sparsity, the methods side by side. Right: FedDIP minus FedDP. Both with a
    point per seed, and the 95 % interval where there are three."""
    figure, axes = style.grid(1, 2, 3.4)
    left, right = axes[0]
    accuracy_panel(left, runs)
    percent = _percent(runs)
    won = [(percent[s], gain, "FedDIP") for s, values in gains(runs).items() for gain in values]
    own = pd.DataFrame(won, columns=["sparsity", "gain", "name"])
    looks = {"FedDIP": style.look_of(runs[runs["label"] == "FedDIP"])}
    style.over_seeds(own, "sparsity", "gain", looks, right, joined=True, order=list(percent.values()))
    right.axhline(0, color=INK, linewidth=0.8)
    right.set(xlabel="target sparsity [%], equal distances", ylabel="FedDIP minus FedDP, paired by seed")
    _headed(figure, runs, title, "bars: 95 % intervals over seeds")
    return figure


def accuracy_panel(panel: Axes, runs: pd.DataFrame) -> None:
    """Final accuracy at each target sparsity, the methods side by side, with their legend."""
    percent = _percent(runs)
    shown = runs.assign(name=runs["label"], sparsity=runs["target_sparsity"].map(percent))
    looks = {label: style.look_of(runs[runs["label"] == label]) for label in labels(runs)}
    style.over_seeds(shown, "sparsity", "accuracy", looks, panel, joined=True, order=list(percent.values()))
    panel.set(xlabel="target sparsity [%], equal distances", ylabel="final test accuracy")
    seeds = runs.groupby(["label", "target_sparsity"]).size()
    style.legend(panel, {counted(name, seeds[name]): look for name, look in looks.items()}, loc="lower left")


def _percent(runs: pd.DataFrame) -> dict[float, str]:
    return {sparsity: f"{100 * sparsity:g}" for sparsity in sorted(runs["target_sparsity"].unique())}


@styled
def ablation(runs: pd.DataFrame, title: str) -> Figure:
    """Each variant minus FedDIP, paired by seed: a point per seed, and the 95 % interval where there are three."""
    found = {counted(name, [len(values)]): values for name, values in _variants(runs).items() if len(values)}
    rows = [(name, value, "FedDIP") for name, values in found.items() for value in values]
    figure, axes = style.grid(1, 1, 0.36 * len(found) + 0.9)
    looks = {"FedDIP": style.look_of(runs[runs["method"] == "feddip"])}
    data = pd.DataFrame(rows, columns=["variant", "gain", "name"])
    style.over_seeds(data, "gain", "variant", looks, axes[0][0])
    axes[0][0].axvline(0, color=INK, linewidth=0.8)
    axes[0][0].set(xlabel="final accuracy minus FedDIP's, paired by seed", ylabel="")
    _headed(figure, runs, title, f"target sparsity {runs['target_sparsity'].iloc[0]:g}")
    return figure


def at_home(results: pd.DataFrame) -> pd.DataFrame:
    """The runs that share all but sparsity, weight decay, seed and what belongs to a method with most FedDIP runs."""
    first = results.drop_duplicates("run_id")
    alike = first.groupby(_SHARED, dropna=False).ngroup()
    home = alike[first["method"] == "feddip"].mode().head(1)
    return results[results["run_id"].isin(first.loc[alike.isin(home), "run_id"])]


def _variant(run: pd.Series) -> str:
    words = ["no penalty (FedDP)"] * (run["method"] == "feddp")
    words += [f"weight decay {run['weight_decay']:g}"] * (run["weight_decay"] != DECAY)
    notes = run["label"].partition(" (")[2].removesuffix(")")
    return ", ".join([*words, *[notes] * bool(notes)]) or "FedDIP"


def _variants(runs: pd.DataFrame) -> dict[str, np.ndarray]:
    """variant -> its accuracy minus FedDIP's over common seeds; FedDIP first, with none, the others by name."""
    named = runs.assign(label=runs["variant"])
    names = sorted(named["variant"].unique(), key=lambda name: (name != "FedDIP", "decay" in name, name))
    return {name: paired(named, name, "FedDIP") if name != "FedDIP" else np.empty(0) for name in names}


def _headed(figure: Figure, runs: pd.DataFrame, title: str, more: str) -> None:
    words = [word for word in runs["setting"].iloc[0].split(", ") if not word.startswith("target sparsity")]
    shown = [*words[:4], *(word for word in words[4:] if word == SHARED_START)]
    style.headed(figure, f"{title}; {runs['split'].iloc[0]}", f"{', '.join(shown)}; {more}")
