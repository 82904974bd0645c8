"""Figures of results: accuracy against rounds and bytes, columns against rounds, methods side by side.

Results come as `names.describe` returns them. Legends carry n, axis labels carry units, and every figure says on
itself which data and how many rounds. With three seeds or more a line is their mean with its 95 % Student t interval;
with fewer, each seed is a thin line of its own. Read before: `style.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..methods.registry import METHODS
from ..records.catalogue import comparable
from ..records.names import FAMILIES, labels, splits
from ..records.store import HEADLINE_ROWS, headline
from .statistics import interval
from .style import AXES, counted, grid, log_ticks, look_of, styled, wrapped

MARKERS = dict(zip(FAMILIES, (("o", "circle"), ("s", "square"), ("^", "triangle")), strict=True))
DRAWN = {"sparsity": "steps-post", "penalty": "steps-post"}  # constant from one row to the next


@styled
def accuracy_curves(
    sources: Mapping[str, pd.DataFrame], x: Sequence[str] = ("round", "mib"), y: str = "accuracy"
) -> Figure:
    """Accuracy of the sparse global model: a column per source and `x`, a row per partition.

    Args:
        sources: results by title; the title is shown above the source's columns. Empty ones are left out.
        x: columns of the results to draw against, of "round" and "mib". y: "accuracy" or "top5_accuracy".
    """
    shown = [(title, results, name) for title, results in sources.items() if len(results) for name in x]
    rows = splits(pd.concat([results for _, results, _ in shown]))
    figure, axes = grid(len(rows), len(shown), 4.6 if len(shown) > 1 else 6.4, 3.8)
    for row, split in enumerate(rows):
        for column, (title, results, name) in enumerate(shown):
            panel, own = axes[row][column], results[results["split"] == split]
            if own.empty:
                panel.set_axis_off()
                continue
            _methods(panel, own, name, y)
            heading = f"{title}\n{wrapped(own['setting'].iloc[0])}\n" if len(sources) > 1 else ""
            panel.set_title(f"{heading if row == 0 else ''}{split}", loc="left")
            panel.legend(loc="upper left", bbox_to_anchor=(0, -0.17), ncols=2)
            low, high = panel.get_ylim()
            panel.set_ylim(max(low, 0), min(high, 1.02))
    if len(sources) == 1:
        title, results, _ = shown[0]
        setting = results["setting"].iloc[0]
        figure.suptitle(f"{title}\n{wrapped(setting) if len(shown) == 1 else setting}", x=0.01, ha="left")
    return figure


@styled
def column_panels(results: pd.DataFrame, columns: Sequence[str], title: str) -> Figure:
    """Columns of the results against rounds, a panel each, for one setting and one partition."""
    figure, axes = grid(1, len(columns), 4.1, 3.0)
    for panel, column in zip(axes[0], columns, strict=True):
        _methods(panel, results[results[column].notna()], "round", column)
    axes[0][0].legend(loc="best")
    words = f"{results['setting'].iloc[0]}; {results['split'].iloc[0]}"
    figure.suptitle(f"{title}\n{words}", x=0.01, ha="left")
    return figure


@styled
def families(results: pd.DataFrame, title: str, x: Sequence[str] = ("round", "mib")) -> Figure:
    """Accuracy of all methods of one setting and partition, a row per family as the slides sort them; FedAvg and
    FedDIP are in each, presets are left out, and so are seeds that not all methods have. Smoothed as the headline
    value is: means of the last ten rounds."""
    results = comparable(results[results["preset"] == "paper"])
    lowest = headline(results)["accuracy"].min() - 0.1  # what lies below are first rounds
    most = results["mib"].max()
    figure, axes = grid(len(FAMILIES), len(x), 5.6, 3.2)
    for row, family in enumerate(FAMILIES):
        members = [name for name, method in METHODS.items() if method.about.family == family]
        own = results[results["method"].isin([*members, "fedavg", "feddip"])]
        for panel, name in zip(axes[row], x, strict=True):
            _methods(panel, own, name, "accuracy", window=HEADLINE_ROWS)
            panel.set_ylabel(f"accuracy, mean of {HEADLINE_ROWS} rounds")
            panel.set_ylim(bottom=lowest)
            if name == "mib":
                _in_mib(panel, most / 100, most * 1.1)
        axes[row][0].set_title(family, loc="left", fontweight="bold")
        axes[row][-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(f"{title}; {results['split'].iloc[0]}\n{results['setting'].iloc[0]}", x=0.01, ha="left")
    return figure


@styled
def accuracy_for_bytes(results: pd.DataFrame, title: str) -> Figure:
    """Final accuracy against all bytes of the run, a panel per partition, a point per method: its marker tells the
    family, its bar the 95 % interval over seeds (three or more). Further up and further left is better. The preset
    `memory`, whose interval would hide the rest, is left out, and so are seeds that not all methods have."""
    results = comparable(results[results["preset"] != "memory"])
    runs, rows, handles = headline(results), splits(results), {}
    figure, axes = grid(1, len(rows), 4.4, 4.6)
    for panel, split in zip(axes[0], rows, strict=True):
        for label in labels(runs):
            own, seeds = runs[(runs["label"] == label) & (runs["split"] == split)], runs[runs["label"] == label]
            if own.empty:
                continue
            mean, half = interval(own["accuracy"])
            look, about = look_of(own), METHODS[own["method"].iloc[0]].about
            filled = {"-": look["color"]}.get(look["linestyle"], "white")
            mark = {"marker": MARKERS[about.family][0], "color": look["color"], "markerfacecolor": filled}
            name, half = counted(label, seeds.groupby("split").size()), None if np.isnan(half) else half
            point = panel.errorbar(own["mib"].mean(), mean, half, label=name, linestyle="none", markersize=7, **mark)
            handles.setdefault(name, point)
        panel.set(ylabel="final accuracy", title=split)
        _in_mib(panel, runs["mib"].min() / 1.2, runs["mib"].max() * 1.2)
    axes[0][-1].legend(handles=list(handles.values()), loc="center left", bbox_to_anchor=(1.0, 0.5))
    shapes = ", ".join(f"{shape} {family}" for family, (_, shape) in MARKERS.items())
    words = f"{results['setting'].iloc[0]}\n{shapes}; hollow: a preset or form of a method"
    figure.suptitle(f"{title}\n{words}", x=0.01, ha="left")
    return figure


def _in_mib(panel: Axes, low: float, high: float) -> None:
    panel.set(xscale="log", xlim=(low, high), xlabel=f"{AXES['mib']} (log)")
    log_ticks(panel.xaxis)


def _methods(panel: Axes, results: pd.DataFrame, x: str, y: str, window: int = 1) -> None:
    if x == "round":  # a masked upload is the same model for fewer bytes
        results = results[results["changed"] != "upload"]
    for label in labels(results):
        own = results[results["label"] == label]
        look = {**look_of(own), "drawstyle": DRAWN.get(y, "default")}
        whole = own[own["diverged"] == ""]
        if len(whole):
            _over_seeds(panel, whole, x, y, label, look, window)
        for _, broken in own[own["diverged"] != ""].groupby("run_id"):  # up to where it broke down, in no mean
            panel.plot(broken[x], broken[y], label=f"{label}, diverged", linewidth=0.9, **look)
            panel.plot(broken[x].iloc[-1], broken[y].ffill().iloc[-1], "x", color=look["color"], markersize=7)
    panel.set(xlabel=AXES[x], ylabel=AXES[y])
    panel.set_xlim(left=0)


def _over_seeds(panel: Axes, runs: pd.DataFrame, x: str, y: str, label: str, look: dict, window: int) -> None:
    """One method: mean and interval for three seeds or more, else a thin line per seed; of `window` rows together."""
    values = runs.pivot(index="round", columns="seed", values=y).rolling(window, min_periods=1).mean()
    places = runs.assign(place=runs[x]).pivot(index="round", columns="seed", values="place")
    count = values.shape[1]
    if count < 3:
        for number, seed in enumerate(values):
            name = counted(label, [count]) if number == 0 else None
            panel.plot(places[seed], values[seed], label=name, linewidth=1.1, **look)
        return
    mean, places = values.mean(axis=1), places.mean(axis=1)
    half = np.array([interval(row)[1] for row in values.to_numpy()])
    panel.plot(places, mean, label=counted(label, [count]), **look)
    panel.fill_between(places, mean - half, mean + half, color=look["color"], alpha=0.18, linewidth=0)
