"""Figures of the convergence bound, from recorded paths (`path.record_path`) as `records.names.describe` returns them.

A term has the same colour everywhere, a partition too. Every figure says on itself which data and how many rounds.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...records.names import splits
from ...report.style import AXES, COLOURS, INK, grid, legend_below, styled
from .tables import GAMMAS, SETTINGS, TERMS, bound_of, checkpoints, each_run, gamma_of, removed_so_far, summary

TERM_COLOURS = dict(zip(TERMS, ("#e69f00", COLOURS["feddip"], COLOURS["feddst"], COLOURS["feddp"]), strict=True))
SPLIT_COLOURS = ("#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00")
PRESET_LOOKS = {"paper": ("-", "o"), "repo": ("--", "s"), "memory": (":", "^")}
SQUARES = r"squared gradient norm $[F^2/W^2]$"
REMOVED = r"$\Vert w - w \odot m \Vert = \sqrt{\delta}\,\Vert w \Vert$  $[W]$"


@styled
def terms(runs: pd.DataFrame, title: str) -> Figure:
    """Left side and terms against the number of rounds, a row per setting and a column per partition; log axes.

    Constants are those of the whole run: the theorem's hold for all rounds, so only the left side and the pruning
    term move. Solid: the consistent form; dashed: what is printed otherwise; dotted: drift with the median gamma.
    """
    figure, axes = _panels(runs, 4.4, 3.3)
    for panel, run in axes:
        points, removed = checkpoints(run), removed_so_far(run)
        left = points["gradient_square"].expanding().mean()
        panel.plot(points["round"], left, "o-", color=INK, markersize=4, label="left side: running mean")
        look = {"-": {}, "--": {"printed": True}, ":": {"typical": True}}
        for line, form in look.items():
            bound, shown = bound_of(run, **form), {"-": TERMS, "--": ("pruning", "noise"), ":": ("drift",)}[line]
            for name in shown:
                growth = removed / removed.iloc[-1] if name == "pruning" else 1.0 + 0.0 * removed
                kind = {"-": "", "--": ", as printed", ":": r", median $\gamma$"}[line]
                values = (getattr(bound, name) * growth).where(lambda term: term > 0)
                panel.plot(run["round"], values, line, color=TERM_COLOURS[name], label=name + kind)
        panel.set(yscale="log", xlabel=AXES["round"], ylabel=SQUARES)
    legend_below(figure)
    _headed(figure, runs, title)
    return figure


@styled
def path(runs: pd.DataFrame, title: str) -> Figure:
    """gamma, delta and sqrt(delta) ||w|| against rounds, a row per setting, a line per partition.

    The thin line is gamma's median. Estimates below 1, which noise allows, are drawn at 1; where noise hides gamma
    there is no point, and the legend says how often.
    """
    rows = [runs[runs["lr_schedule"] == schedule] for schedule in SETTINGS if (runs["lr_schedule"] == schedule).any()]
    figure, axes = grid(len(rows), 3, 4.1, 3.1)
    for own, panels in zip(axes, rows, strict=True):
        _path_row(own, panels, splits(runs))
    _headed(figure, runs, title)
    return figure


def _path_row(axes: np.ndarray, runs: pd.DataFrame, order: list[str]) -> None:
    names = {"dispersion": r"dispersion $\gamma$", "pruning_error": r"pruning error $\delta$"}
    for run in each_run(runs):
        split, points = run["split"].iloc[0], checkpoints(run)
        colour = SPLIT_COLOURS[order.index(split)]
        finite = points[np.isfinite(points["dispersion"])]
        median, hidden = gamma_of(run, typical=True), len(points) - len(finite)
        label = f"{split}: median {median:.3g}" + (f", hidden at {hidden} of {len(points)}" if hidden else "")
        shown = finite["dispersion"].clip(lower=1)
        axes[0].plot(finite["round"], shown, "o-", markersize=4, color=colour, label=label)
        axes[0].axhline(median, color=colour, linewidth=0.8)
        axes[1].plot(run["round"], run["pruning_error"], color=colour, label=split)
        axes[2].plot(run["round"], run["pruning_distance"], color=colour, label=split)
    axes[0].set(yscale="log", ylabel=names["dispersion"], ylim=(0.8, max(10, 1.3 * axes[0].get_ylim()[1])))
    axes[0].set(xlim=axes[1].get_xlim(), title=SETTINGS[runs["lr_schedule"].iloc[0]])
    axes[1].set(ylabel=names["pruning_error"])
    axes[2].set(ylabel=REMOVED)
    for panel in axes:
        panel.set(xlabel=AXES["round"])
    axes[0].legend(loc="best")


@styled
def pruning_term(runs: pd.DataFrame, title: str) -> Figure:
    """What pruning removes in a whole run, and the term the bound makes of it, against the rounds R between masks; a
    row per partition, a line per preset."""
    rows = summary(runs)
    intervals, order = sorted(rows["mask_interval"].unique()), splits(runs)
    figure, axes = grid(len(order), 2, 4.6, 3.0)
    for panels, split in zip(axes, order, strict=True):
        for preset in [name for name in PRESET_LOOKS if name in set(rows["preset"])]:
            own = (
                rows[(rows["split"] == split) & (rows["preset"] == preset)]
                .groupby("mask_interval")
                .mean(numeric_only=True)
            )
            places = [intervals.index(interval) for interval in own.index]
            line, marker = PRESET_LOOKS[preset]
            look = {"color": COLOURS["feddip"], "marker": marker, "linestyle": line, "label": preset}
            panels[0].plot(places, own["removed"], **look)
            panels[1].plot(places, own["pruning"], **look)
        panels[0].set(ylabel=r"$\Sigma_t \sqrt{\delta_t}\,\Vert w_t \Vert$  $[W]$", title=split)
        panels[1].set(ylabel=r"$2 L \mu\, \Sigma_t \sqrt{\delta_t}\,\Vert w_t \Vert$  $[F^2/W^2]$")
        for panel in panels:
            panel.set(yscale="log", xticks=range(len(intervals)), xticklabels=[f"{r:g}" for r in intervals])
            panel.set_xlabel("rounds R between masks")
        panels[0].legend(title="preset")
    _headed(figure, runs, title)
    return figure


@styled
def shares(runs: pd.DataFrame, title: str) -> Figure:
    """The share of each term of the right side, consistent and as printed; two bars per run, for the largest gamma and
    for its median."""
    each = each_run(runs)
    figure, axes = grid(1, 2, 5.6, 0.62 * len(each) + 1.0)
    for panel, printed in zip(axes[0], (False, True), strict=True):
        bars = {}
        for run, name in zip(each, summary(runs)["name"], strict=True):
            for gamma in GAMMAS:
                bound = bound_of(run, typical=gamma == "median", printed=printed)
                bars[f"{name}, {gamma} " + r"$\gamma$"] = bound.shares()
        table, start = pd.DataFrame(bars).T, 0.0
        for name in TERMS:
            panel.barh(table.index, 100 * table[name], left=start, color=TERM_COLOURS[name], label=name)
            start = start + 100 * table[name]
        panel.set(xlabel="share of the right side [%]", title="as printed" if printed else "consistent", xlim=(0, 100))
        panel.invert_yaxis()
        panel.grid(False, axis="y")
    axes[0][1].set_yticklabels([])
    legend_below(figure)
    _headed(figure, runs, title)
    return figure


def _panels(runs: pd.DataFrame, width: float, height: float) -> tuple[Figure, Iterator[tuple[Axes, pd.DataFrame]]]:
    """A figure with a row per setting and a column per partition, and its (panel, run) pairs; titles are set."""
    schedules, order = [name for name in SETTINGS if (runs["lr_schedule"] == name).any()], splits(runs)
    figure, axes = grid(len(schedules), len(order), width, height)
    pairs = []
    for panel in axes.flat:
        panel.set_axis_off()
    for run in each_run(runs):
        schedule, split = run["lr_schedule"].iloc[0], run["split"].iloc[0]
        panel = axes[schedules.index(schedule)][order.index(split)]
        panel.set_axis_on()
        panel.set_title(f"{split}, {SETTINGS[schedule]}", loc="left")
        pairs.append((panel, run))
    return figure, pairs


def _headed(figure: Figure, runs: pd.DataFrame, title: str) -> None:
    words = runs["setting"].iloc[0].split(", ")  # panels say the schedule
    shown = [word for word in words if not word.startswith(("lr schedule", "smoothness"))]
    figure.suptitle(f"{title}\n{', '.join(shown)}", x=0.01, ha="left")
