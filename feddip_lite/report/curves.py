"""Figures of results: accuracy against rounds, and against bytes with all methods side by side.

Results come as `names.describe` returns them. Legends carry n, axis labels carry units, and every figure says on
itself which data and how many rounds. Each seed is a thin line, their mean a thick one from three seeds on; a run that
diverged is a line up to a cross, and enters no mean.
Read before: `style.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..records.catalogue import comparable
from ..records.names import FAMILIES, family_of, labels, splits, told_apart
from ..records.store import HEADLINE_ROWS, headline
from . import style
from .statistics import interval
from .style import AXES, GREY, counted, look_of, styled

BROKEN = ", diverged"
REFERENCE = "FedAvg"  # whose accuracy is subtracted, seed by seed


@styled
def accuracy_curves(results: pd.DataFrame, title: str = "", y: str = "accuracy", reference: str = REFERENCE) -> Figure:
    """Accuracy of the sparse global model against rounds, as means of up to ten rows, a column per partition. Below, in
    a row of its own, what each method has more or less than `reference` has under the same seed in the same round; this
    row is left out where nothing can be compared.

    Args:
        title: shown above the panels, before what all runs have in common.
        y: "accuracy" or "top5_accuracy". reference: a label of the results.

    Raises:
        ValueError: a label has two runs under one seed ("duplicate").
    """
    results = told_apart(results[results["changed"] != "upload"])  # a masked upload is the same model for fewer bytes
    window = max(1, min(HEADLINE_ROWS, int(results.groupby("run_id").size().max()) // 5))
    means = results.groupby("run_id")[y].transform(lambda own: own.rolling(window, min_periods=1).mean().ffill())
    runs = results[["label", "seed", "run_id", "round", "diverged", "split"]].assign(y=means)
    whole, broken = runs[runs["diverged"] == ""], runs[runs["diverged"] != ""]
    above, below = AXES[y], f"minus {reference}'s, same seed"
    # Above the seeds themselves, below the interval of their differences: it is the one that a comparison has.
    curves = _seed_lines(whole).drop(columns=["low", "high"]).assign(row=above)
    compared = _seed_lines(_minus(whole, reference)).assign(row=below)
    compared = compared[(compared["unit"] == "") | (compared["n"] < 3)]
    rows = pd.concat([curves, _broken_lines(broken).assign(row=above), compared], ignore_index=True)
    names, looks = _names(rows, results)
    rows = rows.assign(x=rows["round"], name=rows["label"].map(names))
    shown = [row for row in (above, below) if row in set(rows["row"])]
    panels = style.line_panels(rows, looks, "", row="row", row_order=shown, col="split", col_order=splits(results))
    for (row, split), panel in panels.axes_dict.items():
        own = rows[(rows["row"] == row) & (rows["split"] == split)]
        _zoom(panel, own, with_zero=row == below)
        style.round_axis(panel)
        panel.set(ylabel=row)
        panel.set_title(split if row == above else "", loc="left")
        if row == below:
            panel.axhline(0, color=GREY, linewidth=1, zorder=1)
    setting = ": ".join(filter(None, [title, results["setting"].iloc[0]]))
    style.headed(panels.figure, setting, "; ".join(_words(window, rows)))
    return panels.figure


def _words(window: int, rows: pd.DataFrame) -> Iterator[str]:
    """How to read the lines."""
    if window > 1:
        yield f"means of {window} evaluated rounds"
    if rows["n"].max() >= 3:
        yield "thin: a seed; thick: mean over seeds"
    if rows["low"].notna().any():
        yield "band: 95 % interval"


def _minus(runs: pd.DataFrame, reference: str) -> pd.DataFrame:
    """`runs` with `y` minus that of `reference` with the same partition, seed and round; where both have one."""
    same, own = ["split", "seed", "round"], runs["label"] != reference
    both = runs[own].merge(runs.loc[~own, [*same, "y"]], on=same, suffixes=("", "_reference"))
    return both.assign(y=both["y"] - both["y_reference"])


def _seed_lines(runs: pd.DataFrame) -> pd.DataFrame:
    """What `style.lines` draws of `runs`: a line per seed; of three seeds or more their mean too, with its 95 % Student
    interval. `n` counts a label's seeds."""
    found = [runs.assign(n=0, unit="", low=np.nan, high=np.nan, ends=False).iloc[:0]]
    for (split, label), own in runs.groupby(["split", "label"]):
        table = own.pivot(index="round", columns="seed", values="y")
        count = table.shape[1]
        found.append(own.assign(n=count, unit=own["seed"].astype(str), ends=False))
        if count >= 3:
            means, halves = np.array([interval(row) for row in table.to_numpy()]).T
            line = {"round": table.index, "y": means, "low": means - halves, "high": means + halves, "n": count}
            found.append(pd.DataFrame({**line, "label": label, "split": split, "unit": "", "ends": False}))
    return pd.concat(found, ignore_index=True)


def _broken_lines(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs that diverged: lines of their own, each up to a cross."""
    last = ~runs.duplicated("run_id", keep="last")
    return runs.assign(n=0, unit=runs["run_id"], label=runs["label"] + BROKEN, ends=last)


def _names(rows: pd.DataFrame, results: pd.DataFrame) -> tuple[dict[str, str], dict[str, dict]]:
    """(label -> its name in the legend, with n; name -> look) of the rows of lines."""
    names, looks, order = {}, {}, labels(results)
    for label in sorted(rows["label"].unique(), key=lambda label: order.index(label.removesuffix(BROKEN))):
        seeds = set(rows.loc[rows["label"] == label, "n"])
        names[label] = counted(label, seeds) if max(seeds) else label
        looks[names[label]] = look_of(results[results["label"] == label.removesuffix(BROKEN)])
    return names, looks


def _zoom(panel: Axes, rows: pd.DataFrame, with_zero: bool) -> None:
    """As far as lines reach once a fifth of the run is over, what broke down, the last intervals, and perhaps 0."""
    last = rows["round"].max()
    late = rows.loc[(rows["round"] >= last / 5) | (rows["n"] == 0), "y"]
    ends = rows.loc[rows["round"] == last, ["low", "high"]].to_numpy().ravel()
    shown = np.concatenate([late, ends, [0.0] if with_zero else []])
    low, high = np.nanmin(shown), np.nanmax(shown)
    room = 0.08 * (high - low) or 0.01
    panel.set_ylim(low - room, high + room)


@styled
def accuracy_for_bytes(results: pd.DataFrame, title: str, named: Collection[str] | None = None) -> Figure:
    """Final accuracy against all bytes of the run (`bytes_panel`), a panel per partition. Only the labels in `named`
    are written beside their points; None: all."""
    splits_shown = splits(results)
    figure, axes = style.grid(len(splits_shown), 1, 3.4)  # wide, so that names have room
    panels = dict(zip(splits_shown, axes[:, 0], strict=True))
    points = {split: bytes_panel(panel, results, split) for split, panel in panels.items()}
    runs = headline(comparable(results[_shown(results)]))
    style.family_legend(figure, [name for name in FAMILIES if name in set(runs["method"].map(family_of))])
    seeds = counted(title, runs.groupby(["split", "label"]).size())
    style.headed(figure, seeds, results["setting"].iloc[0], BYTES_WORDS)
    for split, panel in panels.items():
        written = [(x, y, name if named is None or name in named else "") for x, y, name in points[split]]
        style.name_points(panel, written)
    return figure


BYTES_WORDS = (
    "hollow: a preset or form of a method; dotted: the methods that none beats in both; bars: 95 % intervals over "
    "seeds, each against FedAvg's own (grey, at the edge: FedDIP's, where the methods have none)"
)


def bytes_panel(panel: Axes, results: pd.DataFrame, split: str) -> list[tuple[float, float, str]]:
    """Final accuracy, minus that of FedAvg under the same seed if it is there, against all bytes of the run in one
    partition, a point per method: its colour tells the family, its bar the 95 % interval over seeds (three or more);
    where no method shown has one, a grey bar is FedDIP's. Further up and further left is better; the dotted line joins
    the methods that none beats in both. The preset `memory`, whose interval would hide the rest, is left out, and so
    are seeds that not all methods have.

    Returns: the points and their names, for `style.name_points` to write when nothing moves any more.
    """
    every = told_apart(results[_shown(results)])
    runs = headline(comparable(every))
    own = _minus_reference(runs[runs["split"] == split])
    points = [_point(panel, own[own["label"] == label], label) for label in labels(own)]
    best = [(x, y) for x, y, _ in sorted(points) if not any(a <= x and b > y for a, b, _ in points)]
    panel.plot(*zip(*best, strict=True), color=GREY, linewidth=1, linestyle=":", zorder=0)
    panel.set_title(split, loc="left")
    minus = f", minus {REFERENCE}'s" if REFERENCE in set(own["label"]) else ""
    panel.set_ylabel("final accuracy" + minus)
    panel.set(xscale="log", xlim=(runs["mib"].min() / 1.3, runs["mib"].max() * 1.4), xlabel=AXES["mib"])
    panel.margins(y=0.12)  # names stand above points, too
    style.log_ticks(panel.xaxis)
    if own.groupby("label").size().max() < 3:
        _seed_bar(panel, headline(every[every["split"] == split]))
    return points


def _shown(results: pd.DataFrame) -> pd.Series:
    return ~results["label"].str.endswith("(memory)")


def _minus_reference(runs: pd.DataFrame) -> pd.DataFrame:
    """Rows of `headline` of one partition, accuracies minus that of REFERENCE under the same seed, if it is there."""
    usual = runs[runs["label"] == REFERENCE].set_index("seed")["accuracy"]
    return runs.assign(accuracy=runs["accuracy"] - runs["seed"].map(usual)) if len(usual) else runs


def _point(panel: Axes, runs: pd.DataFrame, label: str) -> tuple[float, float, str]:
    """Draw one method's point and bar; returns the place and its name."""
    mean, half = interval(runs["accuracy"])
    look, x = look_of(runs), runs["mib"].mean()
    shape = {"marker": look["marker"], "color": look["color"], "markersize": 7, "label": label, "linestyle": "none"}
    fill = "white" if (runs["preset"].iloc[0], runs["changed"].iloc[0]) != ("paper", "") else look["color"]
    (_, _, bars) = panel.errorbar(x, mean, None if np.isnan(half) else half, markerfacecolor=fill, **shape)
    for bar in bars:
        bar.set(alpha=0.4, zorder=1)
    return x, mean, label


def _seed_bar(panel: Axes, runs: pd.DataFrame) -> None:
    """At the right edge, FedDIP's interval, if it was run three times."""
    runs = _minus_reference(runs)
    mean, half = interval(runs.loc[runs["label"] == "FedDIP", "accuracy"])
    if np.isfinite(half):
        panel.errorbar(panel.get_xlim()[1] / 1.07, mean, half, color=GREY, capsize=3)
