"""Figures of what pruning saves: bytes of recorded runs; latency and file size from `measure.py`'s measurements.

A method has its colour of `report/style.py`, a form of a model the same colour everywhere.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...records.catalogue import comparable
from ...records.names import labels
from ...records.store import HEADLINE_ROWS
from ...report.style import AXES, COLOURS, INK, grid, legend_below, log_ticks, look_of, styled
from .measure import BOTH, CSR, DENSE, SHRUNK, crossing
from .tables import PUBLISHED, published_bytes

FORM_COLOURS = {DENSE: INK, CSR: COLOURS["feddp"], SHRUNK: COLOURS["prunefl"], BOTH: COLOURS["feddst"]}


@styled
def bytes_by_method(runs: pd.DataFrame, title: str) -> Figure:
    """KiB per client and round, down and up, as means of ten rounds (dotted: the published formula), and the MiB of the
    whole run; runs of one setting and partition, the first seed that all methods have. The bars' names are the lines'
    legend."""
    runs = comparable(runs)
    runs = runs[runs["seed"] == runs["seed"].min()]
    figure, axes = grid(1, 3, 4.4, 4.4)
    for panel, way in zip(axes[0], ("down", "up"), strict=False):
        for label in labels(runs):
            own = runs[runs["label"] == label]
            each = 2**10 * own["clients_per_round"].iloc[0]
            rounds = own["round"].diff().fillna(own["round"] + 1)  # a row's bytes are those since the row before
            smooth = (own[f"{way}_bytes"] / rounds).rolling(HEADLINE_ROWS, min_periods=1).mean() / each
            panel.plot(own["round"], smooth, linewidth=1.3, **look_of(own))
            if label in PUBLISHED:
                formula = published_bytes(own)[f"{way}_bytes"] / each
                panel.plot(formula.index, formula, ":", color=INK)
        panel.set(xlabel=AXES["round"], ylabel=f"KiB {way} per client and round")
        panel.set_ylim(bottom=0)
    _totals(axes[0][2], runs)
    words = f"{runs['setting'].iloc[0]}; {runs['split'].iloc[0]}, seed {runs['seed'].iloc[0]}"
    figure.suptitle(
        f"{title}\n{words}; means of {HEADLINE_ROWS} rounds, dotted: the published formula", x=0.01, ha="left"
    )
    return figure


def _totals(panel: Axes, runs: pd.DataFrame) -> None:
    """A bar per method: down, and up behind it."""
    names = labels(runs)[::-1]
    for place, label in enumerate(names):
        own = runs[runs["label"] == label]
        down, up = (own[way].sum() / 2**20 for way in ("down_bytes", "up_bytes"))
        panel.barh(place, down, color=look_of(own)["color"])
        panel.barh(place, up, left=down, color=look_of(own)["color"], alpha=0.4)
    panel.set(yticks=range(len(names)), yticklabels=names, xlabel=AXES["mib"], title="down (solid) and up (pale)")
    panel.tick_params(axis="y", labelsize=8.5)
    panel.grid(False, axis="y")


@styled
def latency(rows: pd.DataFrame, title: str) -> Figure:
    """Milliseconds against sparsity, a line per form with its quartiles; a row per model, a column per batch size; log
    axis. A dotted line marks the sparsity from which on a sparse form is faster than the dense one."""
    models, batches = rows["model"].unique(), rows["batch"].unique()
    figure, axes = grid(len(models), len(batches), 4.4, 2.8)
    for panels, model in zip(axes, models, strict=True):
        for panel, batch in zip(panels, batches, strict=True):
            own = rows[(rows["model"] == model) & (rows["batch"] == batch)]
            ticks = _sparsity_axis(panel, own["sparsity"])
            for form in [form for form in FORM_COLOURS if form in set(own["form"])]:
                line = own[own["form"] == form].sort_values("sparsity")
                places, look = [ticks.index(s) for s in line["sparsity"]], {"color": FORM_COLOURS[form]}
                panel.plot(places, line["median"], "o-", markersize=4, label=form, **look)
                panel.fill_between(places, line["lower"], line["upper"], alpha=0.18, linewidth=0, **look)
            if (found := crossing(own.to_dict("records"))) is not None:
                panel.axvline(ticks.index(found), color=INK, lw=1, ls=":")
            what = f", {own['layer'].iloc[0]}" if "layer" in own else ""
            room = {"ylim": (own["lower"].min() / 1.5, own["upper"].max() * 1.5)}  # for ticks between
            panel.set(yscale="log", title=f"{model}{what}, batch {batch}", **room)
            log_ticks(panel.yaxis)
        panels[0].set_ylabel("ms per forward pass")
    legend_below(figure)
    figure.suptitle(f"{title}\nbands: quartiles; dotted: a sparse form is faster from here on", x=0.01, ha="left")
    return figure


@styled
def file_sizes(models: pd.DataFrame, title: str) -> Figure:
    """KiB of a pruned model against its sparsity, a panel per model: file, message, and the formula 4n(1 - s)."""
    names = models["model"].unique()
    figure, axes = grid(1, len(names), 3.6, 2.9)
    for panel, name in zip(axes[0], names, strict=True):
        own = models[models["model"] == name].sort_values("target")
        places = range(len(_sparsity_axis(panel, own["target"])))
        formula = 4 * own["weights"] * (1 - own["sparsity"])
        lines = {"dense file": own["dense_file"], "file: values and a bit per weight": own["file"]}
        lines |= {"message: values and coded mask": own["message"], "published formula 4n(1 - s)": formula}
        looks = ((INK, "_-"), (FORM_COLOURS[CSR], "o-"), (FORM_COLOURS[SHRUNK], "s-"), (INK, "_:"))
        for (label, sizes), (colour, line) in zip(lines.items(), looks, strict=True):
            panel.plot(places, sizes / 2**10, line, color=colour, markersize=4, label=label)
        panel.set(title=name)
        panel.set_ylim(bottom=0)
    axes[0][0].set_ylabel("KiB")
    legend_below(figure)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def _sparsity_axis(panel: Axes, sparsities: pd.Series) -> list[float]:
    """Sparsities at equal distances, since what matters is close to 1; returns them in order."""
    ticks = sorted(sparsities.unique())
    panel.set_xticks(range(len(ticks)), [f"{sparsity:g}" for sparsity in ticks])
    panel.set_xlabel("sparsity")
    return ticks
