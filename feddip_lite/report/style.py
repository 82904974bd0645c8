"""What all figures share: one style, one colour per method, axes with units, legends, and one `save_figure`.

The figures themselves are in `curves.py` and in `studies/`, drawings that explain ideas in `diagrams.py`.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Collection
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import rcParams
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ..records.store import ROOT, atomic_write

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
    "members_accuracy": "mean accuracy of local models",
    "merging_gain": "accuracy of the mean of local models,\nminus their mean accuracy",
}  # fmt: skip


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
