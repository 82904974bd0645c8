"""Settings chosen on held-out training data, then tested once on the whole: `params/lite.yaml`, tiers 7 and 12."""

from __future__ import annotations

from dataclasses import fields

import pandas as pd
from matplotlib.figure import Figure

from ..config import UNHASHED, Config
from ..records.names import title_of
from ..records.store import headline
from ..report import style
from ..report.statistics import mean_of
from ..report.style import INK, VERMILION, styled

_CONFIG = ["initial_lr" if item.name == "lr" else item.name for item in fields(Config) if item.name not in UNHASHED]
WORDS = {"penalty_max": "penalty", "weight_decay": "weight decay", "initial_lr": "learning rate"}


def _alike(runs: pd.DataFrame, varied: str) -> list[pd.DataFrame]:
    """Groups of runs that share all settings but `varied`, seed, and whether a part of the training set is held out;
    those with two values of `varied` tried on held-out samples."""
    same = [name for name in _CONFIG if name not in (varied, "seed", "validation")]
    groups = [own for _, own in runs.groupby(same, dropna=False)]
    return [own for own in groups if own.loc[own["validation"] > 0, varied].nunique() > 1]


def chosen(results: pd.DataFrame, varied: str) -> pd.DataFrame:
    """The runs on the whole training set, one row each as `headline` has them, whose value of `varied` was the best on
    held-out samples: highest final accuracy there, the smaller value where two are equal. Labels say what was chosen,
    and `split` the target sparsity. None of a setting that was chosen but not run yet."""
    found = []
    for own in _alike(headline(results), varied):
        held = own[own["validation"] > 0].groupby(varied)["accuracy"].mean()
        tested = own[(own["validation"] == 0) & (own[varied] == held.idxmax())]
        labels = tested["method"].map(title_of) + f", chosen {WORDS[varied]}"
        found.append(tested.assign(label=labels, split=[f"s = {s:g}" for s in tested["target_sparsity"]]))
    return pd.concat(found, ignore_index=True) if found else headline(results).iloc[:0]


def candidates_table(results: pd.DataFrame, varied: str) -> pd.DataFrame:
    """What was tried on held-out samples, unjudged: a row per method and target sparsity, a column per value."""
    rows = []
    for own in _alike(headline(results), varied):
        held = own[own["validation"] > 0]
        row = {"method": title_of(held["method"].iloc[0]), "target sparsity": f"{held['target_sparsity'].iloc[0]:g}"}
        tried = {f"{value:g}": mean_of(each["accuracy"], 4) for value, each in held.groupby(varied)}
        rows.append(row | tried | {f"chosen {WORDS[varied]}": f"{held.groupby(varied)['accuracy'].mean().idxmax():g}"})
    return pd.DataFrame(rows)


@styled
def strengths(results: pd.DataFrame, title: str) -> Figure:
    """Held-out accuracy by strength, a panel per target sparsity: the growing penalty, and as much plain weight decay
    (the k-th decay that was tried beside the k-th penalty, the usual decay without a penalty)."""
    held = headline(results[results["validation"] > 0])
    runs = pd.concat([own for varied in ("penalty_max", "weight_decay") for own in _alike(held, varied)])
    peaks = sorted(runs.loc[runs["method"] == "feddip", "penalty_max"].unique())
    places = {0.0: "0"} | {peak: f"{peak:g}" for peak in peaks}
    decays = dict(
        zip(sorted(runs.loc[runs["method"] == "feddp", "weight_decay"].unique()), places.values(), strict=False)
    )
    usual = runs[(runs["method"] == "feddp") & (runs["weight_decay"] == min(decays))]
    plain = runs[runs["method"] == "feddp"]
    grown = pd.concat(
        [
            usual.assign(place="0"),
            runs[runs["method"] == "feddip"].assign(place=lambda own: own["penalty_max"].map(places)),
        ]
    )
    lines = {
        "growing penalty": grown,
        "as much plain weight decay": plain.assign(place=plain["weight_decay"].map(decays)),
    }
    data = pd.concat([own.assign(name=name) for name, own in lines.items()])
    targets = sorted(data["target_sparsity"].unique())
    figure, axes = style.grid(1, len(targets), 3.0)
    looks = dict(zip(lines, ({"color": VERMILION, "marker": "D"}, {"color": INK, "marker": "o"}), strict=True))
    for panel, target in zip(axes[0], targets, strict=True):
        own = data[data["target_sparsity"] == target]
        style.over_seeds(own, "place", "accuracy", looks, panel, joined=True, order=[*places.values()])
        panel.set(xlabel=r"penalty's peak $\lambda_{max}$", ylabel="held-out accuracy")
        panel.set_title(f"s = {target:g}", loc="left")
    style.legend(figure, looks)
    style.headed(figure, title, "a tenth of the training set is held out; nothing here is of the test set")
    return figure
