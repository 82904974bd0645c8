"""Figures of results: accuracy against rounds, and against bytes with all methods side by side.

Results come as `names.describe` returns them. Legends carry n, axis labels carry units, and every figure says on
itself which data and how many rounds. With three seeds or more a line is their mean with its 95 % Student t interval;
with fewer, each seed is a thin line of its own; a run that diverged is one too, up to a cross, and enters no mean.
Read before: `style.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from seaborn import FacetGrid

from ..records.catalogue import comparable
from ..records.names import FAMILIES, family_of, labels, splits, told_apart
from ..records.store import HEADLINE_ROWS, headline
from . import style
from .statistics import interval
from .style import AXES, GREY, counted, look_of, styled

BROKEN = ", diverged"


@styled
def accuracy_curves(
    sources: Mapping[str, pd.DataFrame], x: Sequence[str] = ("round", "mib"), y: str = "accuracy"
) -> Figure:
    """Accuracy of the sparse global model, as means of up to ten rows: a column per source and `x`, a row per
    partition.

    Args:
        sources: results by title; the title is shown above the source's panels. Empty ones are left out.
        x: columns of the results to draw against, of "round" and "mib". y: "accuracy" or "top5_accuracy".
    """
    sources = {title: told_apart(results) for title, results in sources.items() if len(results)}
    everything = pd.concat(sources.values())
    window = max(1, min(HEADLINE_ROWS, int(everything.groupby("run_id").size().max()) // 5))
    parts = {
        (split, f"{name}|{title}"): averaged(own, name, y, window)
        for title, results in sources.items() for name in x for split, own in results.groupby("split")
    }  # fmt: skip
    panels = _panels(parts, everything, y, row_order=splits(everything), sharey="row")
    for (split, column), panel in panels.axes_dict.items():
        panel.set_title(f"{column.split('|')[1]}: {split}" if len(sources) > 1 else split, loc="left")
    settings = [f"{title}: {results['setting'].iloc[0]}" for title, results in sources.items()]
    style.headed(panels.figure, *settings, *[f"means of {window} evaluated rounds"][: window - 1])
    return panels.figure


def _panels(parts: Mapping[tuple, pd.DataFrame], results: pd.DataFrame, y: str, **by) -> FacetGrid:
    """The panels of `parts`, (row, column) -> `averaged` rows, with axes and legend. A column is named by its `x`, of
    `y` zoomed as far as lines reach once a fifth of the run is over."""
    rows = pd.concat([part.assign(row=row, column=column) for (row, column), part in parts.items()])
    names, looks = _names(rows, results)
    rows = rows.assign(name=rows["label"].map(names))
    down, across = (list(dict.fromkeys(keys)) for keys in zip(*parts, strict=True))
    by = {"row": "row", "col": "column", "row_order": down, "col_order": across, **by}
    panels = style.line_panels(rows, looks, "", **by)
    for (row, column), panel in panels.axes_dict.items():
        x = column.split("|")[0]
        panel.set(xlabel=AXES[x], ylabel=AXES[y])
        if x == "mib":
            panel.set(xscale="log", xlim=(rows["x"].max() / 40, rows["x"].max() * 1.1))
            style.log_ticks(panel.xaxis)
        else:
            style.round_axis(panel)
        _zoom(panel, rows[rows["row"] == row])
    return panels


def _names(rows: pd.DataFrame, results: pd.DataFrame) -> tuple[dict[str, str], dict[str, dict]]:
    """(label -> its name in the legend, with n; name -> look) of `averaged` rows."""
    names, looks, order = {}, {}, labels(results)
    for label in sorted(rows["label"].unique(), key=lambda label: order.index(label.removesuffix(BROKEN))):
        seeds = set(rows.loc[rows["label"] == label, "n"])
        names[label] = counted(label, seeds) if max(seeds) else label
        looks[names[label]] = look_of(results[results["label"] == label.removesuffix(BROKEN)])
    return names, looks


def _zoom(panel: Axes, rows: pd.DataFrame) -> None:
    """What broke down stays in sight."""
    late = rows[(rows["round"] >= rows["round"].max() / 5) | (rows["n"] == 0)]["y"]
    room = 0.08 * (late.max() - late.min()) or 0.01
    panel.set_ylim(max(late.min() - room, 0), min(late.max() + room, 1.02))


@styled
def accuracy_for_bytes(results: pd.DataFrame, title: str) -> Figure:
    """Final accuracy against all bytes of the run (`bytes_panel`), a panel per partition."""
    splits_shown = splits(results)
    figure, axes = style.grid(1, len(splits_shown), 4.2)
    panels = dict(zip(splits_shown, axes[0], strict=True))
    points = {split: bytes_panel(panel, results, split) for split, panel in panels.items()}
    runs = headline(comparable(results[results["preset"] != "memory"]))
    style.family_legend(figure, [name for name in FAMILIES if name in set(runs["method"].map(family_of))])
    seeds = counted(title, runs.groupby(["split", "label"]).size())
    style.headed(figure, seeds, results["setting"].iloc[0], BYTES_WORDS)
    for split, panel in panels.items():
        style.name_points(panel, points[split])
    return figure


BYTES_WORDS = (
    "hollow: a preset or form of a method; dotted: the methods that none beats in both; grey bar at the edge: 95 % "
    "interval of FedDIP over its seeds, where the methods have none"
)


def bytes_panel(panel: Axes, results: pd.DataFrame, split: str) -> list[tuple[float, float, str]]:
    """Final accuracy against all bytes of the run in one partition, a point per method: its colour tells the family,
    its bar the 95 % interval over seeds (three or more); where no method shown has one, a grey bar is FedDIP's. Further
    up and further left is better; the dotted line joins the methods that none beats in both. The preset `memory`, whose
    interval would hide the rest, is left out, and so are seeds that not all methods have.

    Returns: the points and their names, for `style.name_points` to write when nothing moves any more.
    """
    every = told_apart(results[results["preset"] != "memory"])
    runs = headline(comparable(every))
    own = runs[runs["split"] == split]
    points = [_point(panel, own[own["label"] == label], label) for label in labels(own)]
    best = [(x, y) for x, y, _ in sorted(points) if not any(a <= x and b > y for a, b, _ in points)]
    panel.plot(*zip(*best, strict=True), color=GREY, linewidth=1, linestyle=":", zorder=0)
    panel.set_title(split, loc="left")
    panel.set_ylabel("final accuracy")
    panel.set(xscale="log", xlim=(runs["mib"].min() / 1.3, runs["mib"].max() * 1.4), xlabel=AXES["mib"])
    style.log_ticks(panel.xaxis)
    if own.groupby("label").size().max() < 3:
        _seed_bar(panel, every[every["split"] == split])
    return points


def averaged(results: pd.DataFrame, x: str, y: str, window: int = 1) -> pd.DataFrame:
    """What `style.lines` draws of `results`, and the `label` and number `n` of seeds of each line; `window` rows
    together are one mean. ValueError ("duplicate") if a label has two runs under one seed."""
    if x == "round":  # a masked upload is the same model for fewer bytes
        results = results[results["changed"] != "upload"]
    smooth = results.groupby("run_id")[y].transform(lambda own: own.rolling(window, min_periods=1).mean().ffill())
    runs = results[["label", "seed", "run_id", "round", "diverged"]].assign(x=results[x], y=smooth)
    found = []
    for label in labels(runs):
        own = runs[runs["label"] == label]
        whole, broken = own[own["diverged"] == ""], own[own["diverged"] != ""]
        x_of, y_of = (whole.pivot(index="round", columns="seed", values=name) for name in ("x", "y"))
        count = y_of.shape[1]
        if count >= 3:
            half = np.array([interval(row)[1] for row in y_of.to_numpy()])
            mean = pd.DataFrame({"x": x_of.mean(axis=1), "y": y_of.mean(axis=1)}).reset_index()
            found.append(mean.assign(label=label, n=count, unit="", low=mean["y"] - half, high=mean["y"] + half))
        else:
            found.append(whole.assign(n=count, unit=whole["seed"].astype(str)))
        found.append(broken.assign(n=0, unit=broken["run_id"], label=label + BROKEN))
    rows = pd.concat([part for part in found if len(part)] or [runs.assign(n=0, unit="")], ignore_index=True)
    last = ~rows.duplicated(["label", "unit"], keep="last")
    return rows.assign(ends=last & (rows["n"] == 0))  # a run that broke down is drawn up to there


def _point(panel: Axes, runs: pd.DataFrame, label: str) -> tuple[float, float, str]:
    """Draw one method's point and bar; returns the place and its name."""
    mean, half = interval(runs["accuracy"])
    look, x = look_of(runs), runs["mib"].mean()
    shape = {"marker": look["marker"], "color": look["color"], "markersize": 7, "label": label, "linestyle": "none"}
    fill = "white" if (runs["preset"].iloc[0], runs["changed"].iloc[0]) != ("paper", "") else look["color"]
    panel.errorbar(x, mean, None if np.isnan(half) else half, markerfacecolor=fill, **shape)
    return x, mean, label


def _seed_bar(panel: Axes, every: pd.DataFrame) -> None:
    """At the right edge, FedDIP's interval, if it was run three times."""
    mean, half = interval(headline(every[every["label"] == "FedDIP"])["accuracy"])
    if np.isfinite(half):
        panel.errorbar(panel.get_xlim()[1] / 1.07, mean, half, color=GREY, capsize=3)
