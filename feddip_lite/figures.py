"""Figures of results: one style, one colour per method, one function per figure, one `save_figure`.

Drawings that explain ideas are in `drawings.py`. Results come as `experiments.describe` returns them. Legends carry n,
axis labels carry units, and every figure says on itself which data and how many rounds. With three seeds or more a line
is their mean with its 95 % Student t interval; with fewer, each seed is a thin line of its own.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from .experiments import FAMILIES, comparable, labels, splits
from .methods import METHODS
from .results import HEADLINE_ROWS, ROOT, atomic_write, headline, interval

COLOURS = {  # Okabe and Ito's palette, safe for colour-blind readers; a method has the same colour everywhere
    "fedavg": "#000000", "fedprox": "#8c8c8c", "feddp": "#0072b2", "feddip": "#d55e00", "feddst": "#009e73",
    "prunefl": "#e69f00", "snip": "#cc79a7", "prunetrain": "#56b4e9", "fedsparsify_global": "#7f5f00",
    "fedsparsify_local": "#7cb518", "mpfl": "#5d3a9b", "fedmap": "#40b0a6", "fedlp": "#994f00", "fedx": "#dc267f",
    "fedtiny": "#648fff",
}  # fmt: skip
INK = "#222222"
STYLE = {
    "font.size": 10, "axes.titlesize": 10, "axes.labelsize": 10, "legend.fontsize": 8.5, "figure.titlesize": 11,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#e4e7ea", "grid.linewidth": 0.8, "axes.edgecolor": "#808890",
    "legend.framealpha": 0.8, "legend.edgecolor": "none",
    "figure.dpi": 110, "lines.linewidth": 1.8, "font.family": "DejaVu Sans", "mathtext.fontset": "dejavusans",
}  # fmt: skip
AXES = {
    "round": "round t", "mib": "transmitted MiB, up + down", "accuracy": "accuracy, whole test set",
    "top5_accuracy": "top-5 accuracy, whole test set", "local_accuracy": "accuracy, mean over clients",
    "sparsity": "sparsity of prunable weights", "penalty": r"penalty $\lambda_t$", "regrown": "weights regrown",
    "mask_overlap": "mask overlap (Jaccard)", "loss": "cross-entropy, whole test set",
    "pruning_error": r"pruning error, share of $\Vert w \Vert^2$", "alignment": "alignment of clients' moves",
    "members_accuracy": "mean accuracy of local models", "merging_gain": "accuracy of their mean, minus that",
}  # fmt: skip
MARKERS = dict(zip(FAMILIES, (("o", "circle"), ("s", "square"), ("^", "triangle")), strict=True))
DRAWN = {"sparsity": "steps-post", "penalty": "steps-post"}  # constant from one row to the next


@contextmanager
def style(**more):
    """Draw under `STYLE`. Only what it sets is restored: a notebook switches its backend on at the first figure."""
    new = {**STYLE, **more}
    before = {name: rcParams[name] for name in new}
    rcParams.update(new)
    try:
        yield
    finally:
        rcParams.update(before)


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """A drawing function that runs under `STYLE`."""

    @functools.wraps(draw)
    def wrapper(*args, **kwargs) -> Figure:
        with style():
            return draw(*args, **kwargs)

    return wrapper


def save_figure(figure: Figure, name: str, folder: str | Path = ROOT / "figures") -> tuple[Path, Path]:
    """Write `<name>.png` and `<name>.svg`; the same figure gives the same bytes, today and tomorrow."""
    paths = Path(folder) / f"{name}.png", Path(folder) / f"{name}.svg"
    metadata = {"Software": None}, {"Date": None, "Creator": None}
    with style(**{"svg.hashsalt": name}):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once: a second time would move everything by a hair
        for path, facts in zip(paths, metadata, strict=True):
            data = io.BytesIO()
            figure.savefig(data, format=path.suffix[1:], metadata=facts, dpi=150, facecolor="white")
            atomic_write(path, data.getvalue())
    return paths


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


def log_ticks(axis: Axis) -> None:
    """Readable ticks for a logarithmic axis: 1, 2 or 5 times powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def look_of(runs: pd.DataFrame) -> dict[str, str]:
    """The colour of these runs' method and the line of their preset or form."""
    method, preset, changed = (runs[name].iloc[0] for name in ("method", "preset", "changed"))
    line = "-." if changed else {"repo": "--", "memory": ":"}.get(preset, "-")
    return {"color": COLOURS.get(method, INK), "linestyle": line}


def _methods(panel: Axes, results: pd.DataFrame, x: str, y: str, window: int = 1) -> None:
    if x == "round":  # a masked upload is the same model for fewer bytes
        results = results[results["changed"] != "upload"]
    for label in labels(results):
        own = results[results["label"] == label]
        look = {**look_of(own), "drawstyle": DRAWN.get(y, "default")}
        _over_seeds(panel, own, x, y, label, look, window)
    panel.set(xlabel=AXES[x], ylabel=AXES[y])
    panel.set_xlim(left=0)


def _over_seeds(panel: Axes, runs: pd.DataFrame, x: str, y: str, label: str, look: dict, window: int) -> None:
    """One method: mean and interval for three seeds or more, else a thin line per seed; of `window` rows together."""
    values = runs.pivot_table(index="round", columns="seed", values=y).rolling(window, min_periods=1).mean()
    places = runs.groupby("round")[x].mean() if x != "round" else values.index.to_series()
    count = values.shape[1]
    if count < 3:
        for number, seed in enumerate(values):
            name = f"{label} (n = {count})" if number == 0 else None
            panel.plot(places, values[seed], label=name, linewidth=1.1, **look)
        return
    mean = values.mean(axis=1)
    half = np.array([interval(row)[1] for row in values.to_numpy()])
    panel.plot(places, mean, label=f"{label} (n = {count})", **look)
    panel.fill_between(places, mean - half, mean + half, color=look["color"], alpha=0.18, linewidth=0)


def grid(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """(figure, axes (rows, columns)), each panel `width` x `height` inches."""
    size = (width * columns, height * rows + 0.6)
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")


def counted(label: str, seeds: Collection[int]) -> str:
    """A name for the legend: `FedDIP (n = 3)`, or `FedDIP (n = 1 to 3)` where the numbers of seeds differ."""
    return f"{label} (n = {' to '.join(map(str, sorted({min(seeds), max(seeds)})))})"


def legend_below(figure: Figure) -> None:
    """One legend below all panels, each label once."""
    lines = {text: line for panel in figure.axes for line, text in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4)


def wrapped(setting: str) -> str:
    """A setting, three of its parts a line."""
    words = setting.split(", ")
    return "\n".join(", ".join(words[start : start + 3]) for start in range(0, len(words), 3))
