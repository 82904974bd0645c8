"""What all figures share: one style, a look per method, panels of lines, axes, legends, and one `save_figure`.

Colours are seaborn's "colorblind" palette. The figures themselves are in `curves.py` and in `studies/`, drawings that
explain ideas in `diagrams.py`.
"""

from __future__ import annotations

import io
import textwrap
import zlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from ..methods.registry import METHODS
from ..records.names import family_of
from ..records.store import ROOT, atomic_write
from .statistics import interval

BLUE, ORANGE, GREEN, VERMILION, PURPLE, BROWN, PINK, GREY, YELLOW, SKY = sns.color_palette("colorblind").as_hex()
INK = "#222222"
FAMILY_COLOURS = {
    "dense to dense": (INK, GREY, "#5f5f5f"),
    "dense to sparse": (BLUE, SKY, GREEN, "#0b3c5d"),
    "sparse to sparse": (PURPLE, VERMILION, ORANGE, BROWN, "#7a1f1f"),
    "own": ("#4b0092", "#40b0a6"),
}
"""The methods of a family take its colours in turn, in their order in METHODS, and markers too."""
MARKERS = "osDv^PX<>"
DASHES = "", (7, 1.5)  # every second method of a family lets through what it covers
OTHER_DASHES = {"repo": (3, 1.5), "memory": (1, 1)}  # by preset; another form of a method has dashes and dots
WIDTH = 8.6  # inches of every figure: shown at 800 pixels, its words are read
STYLE = {
    **sns.axes_style("ticks"), "axes.grid": True, "grid.color": "#e4e7ea", "axes.edgecolor": "#808890",
    "axes.spines.top": False, "axes.spines.right": False, "font.family": "DejaVu Sans",
    "mathtext.fontset": "dejavusans", "font.size": 10, "axes.titlesize": 10, "axes.labelsize": 10, "legend.fontsize": 9,
    "figure.titlesize": 10, "legend.framealpha": 0.8, "legend.edgecolor": "none", "figure.dpi": 110,
    "lines.linewidth": 1.8,
}  # fmt: skip
AXES = {
    "round": "round t", "mib": "transmitted MiB, up + down", "accuracy": "test accuracy",
    "top5_accuracy": "top-5 test accuracy", "local_accuracy": "accuracy, mean over clients",
    "sparsity": "sparsity of prunable weights", "penalty": r"penalty $\lambda_t$", "regrown": "weights regrown",
    "returned": "kept weights that once were pruned", "mask_overlap": "mask overlap (Jaccard)",
    "loss": "cross-entropy, test set",
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


styled = style()
"""Decorates a drawing function, which then runs under `STYLE`."""


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


def look_of(runs: pd.DataFrame) -> dict[str, object]:
    """How these runs are drawn: the colour tells the family, colour and marker the method, dashes the preset or form.
    A method that is not registered has a look too, by its name."""
    method, preset, changed = (runs[name].iloc[0] for name in ("method", "preset", "changed"))
    family = family_of(method)
    members = [name for name in METHODS if family_of(name) == family]
    place = members.index(method) if method in members else zlib.crc32(method.encode())
    colours = FAMILY_COLOURS[family]
    dashes = (5, 1.5, 1, 1.5) if changed else OTHER_DASHES.get(preset, DASHES[place % 2])
    return {"color": colours[place % len(colours)], "marker": MARKERS[place % len(MARKERS)], "dashes": dashes}


def grid(rows: int, columns: int, height: float, width: float = WIDTH) -> tuple[Figure, np.ndarray]:
    """(figure, axes (rows, columns)) of `width` inches, `height` each row."""
    return plt.subplots(rows, columns, figsize=(width, height * rows + 0.6), squeeze=False, layout="constrained")


def line_panels(
    rows: pd.DataFrame, looks: Mapping[str, Mapping], title: str = "{col_name}", height: float = 2.5, **facets
) -> sns.FacetGrid:
    """A grid of panels of lines (`lines`), one figure wide, with a legend of the names that occur.

    Args:
        rows: as `lines` takes them, with the columns that make the panels.
        title: of a panel, of `row_name` and `col_name`. height: of a row of panels, inches.
        facets: of seaborn's FacetGrid: `row`, `col`, `col_wrap`, their orders, what panels share.
    """
    panels = sns.FacetGrid(rows, height=height, **{"sharex": False, "sharey": False, **facets})
    for (row, column, _), own in panels.facet_data():
        panel = panels.facet_axis(row, column)
        lines(own, looks, panel) if len(own) else panel.set_visible(False)
    panels.set_titles("").set_titles(title, loc="left", size=9.5)
    count = panels.axes.flat[0].get_gridspec().nrows
    panels.figure.set_size_inches(WIDTH, height * count + 0.9)
    panels.figure.set_layout_engine("constrained")
    legend(panels.figure, {name: look for name, look in looks.items() if name in set(rows["name"])})
    return panels


def lines(data: pd.DataFrame, looks: Mapping[str, Mapping], panel: Axes) -> None:
    """Lines with their bands on one panel.

    Args:
        data: a row per point: `x`, `y`, `name`, and where there are any `unit`, which tells the thin lines of one name
            from each other and from its thick one (""), which alone has markers; `low` and `high`, a band; `ends`,
            true where a line breaks off and gets a cross.
        looks: name -> color, marker and dashes. Where lines lie on each other, their markers do not.
    """
    names = [name for name in looks if name in set(data["name"])]
    data = data.assign(**{name: value for name, value in _PLAIN.items() if name not in data})
    line = data.groupby(["name", "unit"])["y"]
    every = -(-line.transform("size") // 8)  # about eight markers a line
    single = data["unit"] != ""
    above = ~single | single.groupby(data["name"]).transform("all")
    marked = above & (line.cumcount() % every == data["name"].map(names.index) * every // len(names))
    palette, markers, dashes = ({name: looks[name][key] for name in names} for key in ("color", "marker", "dashes"))
    same = {"x": "x", "y": "y", "hue": "name", "style": "name", "hue_order": names, "style_order": names}
    same |= {"palette": palette, "legend": False, "ax": panel}
    for thin, drawn in data.groupby(~above):
        width = {"size": single, "sizes": {False: 1.8, True: 1.0}, "alpha": 0.4 if thin else 1}
        sns.lineplot(drawn, **same, **width, dashes=dashes, units="unit", estimator=None)
    sns.scatterplot(data[marked], **same, markers=markers, s=32, zorder=3)
    for name, band in data.dropna(subset=["low"]).groupby("name"):
        panel.fill_between(band["x"], band["low"], band["high"], color=looks[name]["color"], alpha=0.15, linewidth=0)
    for end in data[data["ends"]].itertuples():
        panel.plot(end.x, end.y, "X", color=looks[end.name]["color"], markersize=9, zorder=4)


_PLAIN = {"unit": "", "low": np.nan, "high": np.nan, "ends": False}


def legend(place: Figure | Axes, looks: Mapping[str, Mapping], **where) -> None:
    """A legend of a panel, or one below all panels of a figure; looks: name -> color, marker and dashes."""
    handles = [Line2D([], [], label=name, **{"markeredgecolor": "white", **look}) for name, look in looks.items()]
    columns = max(1, min(4, 130 // (max(map(len, looks), default=0) + 12)))
    place.legend(handles=handles, **(where or {"loc": "outside lower center", "ncols": columns}))


def family_legend(figure: Figure, families: Sequence[str]) -> None:
    """Below all panels, which colours the methods of a family have."""
    colours = [FAMILY_COLOURS[name] for name in families]
    dots = [tuple(Line2D([], [], color=each, marker="o", ls="none") for each in own) for own in colours]
    together = {tuple: HandlerTuple(ndivide=None, pad=0.2)}
    where = {"loc": "outside lower center", "ncols": len(families), "handlelength": 4}
    figure.legend(dots, families, handler_map=together, **where)


def headed(figure: Figure, *words: str) -> None:
    """What the figure shows, above all panels: a line per part, two where it is long."""
    room = int(13.5 * figure.get_figwidth())
    figure.suptitle("\n".join(textwrap.fill(part, room) for part in words), x=0.01, ha="left")


def name_points(panel: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write each name beside its point (x, y, name): where its words cover neither a point nor another name, as near
    as there is such a place. A point whose name is empty is only kept free. To be called last, when nothing moves any
    more."""
    panel.figure.draw_without_rendering()
    size = np.array([panel.get_position().width, panel.get_position().height]) * panel.figure.get_size_inches() * 72
    places = panel.transAxes.inverted().transform(panel.transData.transform([point[:2] for point in points])) * size
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    aside = [way * far for far in (9, 20, 35, 60, 90) for way in (1, -1)]
    steps = sorted(product(aside, range(-120, 121, 5)), key=lambda step: np.hypot(*step))
    for (*point, name), (x, y) in zip(points, places, strict=True):
        if not name:
            continue
        boxes = [_box(x + right, y + up, 5.0 * len(name), right < 0) for right, up in steps]
        inside = [box for box in boxes if min(box) > 0 and box[2] < size[0] and box[3] < size[1]]
        free = (box for box in inside if all(_apart(box, other) for other in taken))
        box = next(free, inside[0] if inside else boxes[0])
        right, up = steps[boxes.index(box)]
        taken.append(box)
        line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "visible": np.hypot(right, up) > 11}
        side = {"ha": "left" if right > 0 else "right", "va": "center", "fontsize": 8}
        side["bbox"] = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.3}  # bars may run behind the words
        panel.annotate(name, point, (right, up), textcoords="offset points", color=INK, arrowprops=line, **side)


def _box(x: float, y: float, width: float, ends: bool) -> tuple[float, float, float, float]:
    """Left, lower, right and upper edge of words of this width that begin at (x, y), or end there."""
    left = x - width * ends
    return left, y - 5, left + width, y + 5


def _apart(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] > other[2] or one[2] < other[0] or one[1] > other[3] or one[3] < other[1]


def counted(label: str, seeds: Collection[int]) -> str:
    """A name for the legend: `FedDIP (n = 3)`, or `FedDIP (n = 1 to 3)` where the numbers of seeds differ."""
    return f"{label} (n = {' to '.join(map(str, sorted({min(seeds), max(seeds)})))})"


def over_seeds(
    data: pd.DataFrame, x: str, y: str, looks: Mapping[str, Mapping], panel: Axes, joined: bool = False, **more
) -> None:
    """A point per run and the mean of each `name`, with its 95 % Student interval if there are three, for every place
    on an axis of categories; names stand side by side. The categories are `x`, or `y` if that is no number.

    Args:
        data: a row per run: `x`, `y`, `name`. looks: name -> color and marker. more: of seaborn, like `order`.
        joined: with lines through the means; of several names with three runs each, or a single one, no points.
    """
    names = [name for name in looks if name in set(data["name"])]
    same = {"data": data, "x": x, "y": y, "hue": "name", "hue_order": names, "legend": False, "ax": panel, **more}
    if not names:
        return
    apart = 0.8 * (1 - 1 / len(names))  # as a stripplot's
    runs = data.groupby(["name", x]).size()
    if joined and len(names) > 1 and (runs.min() >= 3 or runs.max() == 1):
        apart = 0.2
    else:
        seeds = {"palette": [INK] * len(names), "dodge": True, "jitter": False, "size": 3.5, "alpha": 0.55}
        sns.stripplot(**same, **seeds)
    means = {"palette": [looks[name]["color"] for name in names], "markers": [looks[name]["marker"] for name in names]}
    means |= {"dodge": apart, "markersize": 6, "capsize": 0.08, "err_kws": {"linewidth": 1.5}, "errorbar": _student}
    sns.pointplot(**same, **means, **({"linewidth": 1.8} if joined else {"linestyle": "none"}))


def _student(values: pd.Series) -> tuple[float, float]:
    mean, half = interval(values)
    return mean - half, mean + half


def round_axis(panel: Axes) -> None:
    """The axis of rounds: whole numbers, from 0."""
    panel.set(xlabel=AXES["round"], xlim=(0, None))
    panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def log_ticks(axis: Axis) -> None:
    """Readable ticks for a logarithmic axis: 1, 2 or 5 times powers of ten; within half a decade, any round numbers."""
    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high / low > 5 else MaxNLocator(4))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
