"""Figures of what pruning saves: bytes of recorded runs; latency and file size from `measure.py`'s measurements.

A method has its look of `report/style.py`, a form of a model the same one everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure
from seaborn import FacetGrid

from ...records.catalogue import comparable
from ...records.names import FAMILIES, family_of, labels
from ...records.store import HEADLINE_ROWS
from ...report import style
from ...report.style import BLUE, GREEN, INK, ORANGE, styled
from .measure import BOTH, CSR, DENSE, SHRUNK
from .tables import PUBLISHED, published_bytes

FORM_LOOKS = {DENSE: (INK, "o"), CSR: (BLUE, "s"), SHRUNK: (ORANGE, "^"), BOTH: (GREEN, "D")}
FORMULA = "published formula"
FORMULA_LOOK = {"color": INK, "marker": ".", "dashes": (1, 1)}
SIZE_LOOKS = {
    "dense file": {"color": INK, "marker": "o", "dashes": ""},
    "file: values and a bit per weight": {"color": BLUE, "marker": "s", "dashes": ""},
    "message: values and coded mask": {"color": ORANGE, "marker": "^", "dashes": ""},
    f"{FORMULA} 4n(1 - s)": FORMULA_LOOK,
}


@styled
def bytes_by_method(runs: pd.DataFrame, title: str) -> Figure:
    """KiB per client and round, down and up (`rates`), a row per family; runs of one setting and partition, the first
    seed that all methods have."""
    runs = comparable(runs)
    runs = runs[runs["seed"] == runs["seed"].min()]
    rows = pd.concat([rates(runs[runs["label"] == label], way) for label in labels(runs) for way in ("down", "up")])
    looks = {label: style.look_of(runs[runs["label"] == label]) for label in labels(runs)} | {FORMULA: FORMULA_LOOK}
    shown = [family for family in FAMILIES if family in set(rows["family"])]
    panels = style.line_panels(rows, looks, "{row_name}", row="family", col="way", row_order=shown)
    for (_, way), panel in panels.axes_dict.items():
        style.round_axis(panel)
        panel.set(ylabel=f"KiB {way}", ylim=(0, None))
    words = f"{runs['setting'].iloc[0]}; {runs['split'].iloc[0]}, seed {runs['seed'].iloc[0]}"
    style.headed(panels.figure, f"{title}; KiB per client and round, means of {HEADLINE_ROWS} evaluated rounds", words)
    return panels.figure


def rates(run: pd.DataFrame, way: str) -> pd.DataFrame:
    """KiB per client and round of one run, "up" or "down", in means of ten rows, and where it applies, what the
    published formula says: a row per evaluated round `x`, `y`, `name`, `way` and the method's `family`."""
    each = 2**10 * run["clients_per_round"].iloc[0]
    rounds = run["round"].diff().fillna(run["round"] + 1)  # a row's bytes are those since the row before
    kib = (run[f"{way}_bytes"] / rounds).rolling(HEADLINE_ROWS, min_periods=1).mean() / each
    rows = pd.DataFrame({"x": run["round"], "y": kib, "name": run["label"]})
    if run["label"].iloc[0] in PUBLISHED:
        formula = published_bytes(run)[f"{way}_bytes"] / each
        rows = pd.concat([rows, pd.DataFrame({"x": formula.index, "y": formula, "name": FORMULA})])
    return rows.assign(unit=rows["name"] + run["run_id"].iloc[0], way=way, family=family_of(run["method"].iloc[0]))


@styled
def latency(rows: pd.DataFrame, title: str) -> Figure:
    """Time over the dense form's median (`ratios`) against sparsity, a panel per model, a line per form and batch size
    with its quartiles; log axis. A form whose band lies below the dense one's is faster."""
    rows, looks = ratios(rows), {}
    for dashes, batch in zip(("", (3, 1.5)), sorted(rows["batch"].unique()), strict=False):
        for form, (colour, marker) in FORM_LOOKS.items():
            looks[f"{form}, batch {batch}"] = {"color": colour, "marker": marker, "dashes": dashes}
    panels = _over_sparsity(rows, "sparsity", looks, height=2.4, sharey=True)
    for panel in panels.axes.flat:
        panel.set(yscale="log")
        style.log_ticks(panel.yaxis)
    panels.set_ylabels("time, dense = 1")
    style.headed(panels.figure, title, "bands: quartiles; what lies below the grey band is faster than the dense form")
    return panels.figure


def ratios(rows: pd.DataFrame) -> pd.DataFrame:
    """Measured times as shares of the dense form's median at the same sparsity and batch size: `y`, `low`, `high`
    (quartiles), and `name` (form and batch); the `model` says the layer too, if only one was timed."""
    same = ["model", "batch", "sparsity"]
    dense = rows[rows["form"] == DENSE].set_index(same)["median"].rename("dense")
    rows = rows.join(dense, on=same)
    over = {new: rows[old] / rows["dense"] for new, old in (("y", "median"), ("low", "lower"), ("high", "upper"))}
    names = rows["form"] + ", batch " + rows["batch"].astype(str)
    model = rows["model"] + ", " + rows["layer"] if "layer" in rows else rows["model"]
    return rows.assign(**over, name=names, model=model)


@styled
def file_sizes(models: pd.DataFrame, title: str) -> Figure:
    """KiB of a pruned model against its sparsity (`sizes_in_kib`), a panel per model."""
    panels = _over_sparsity(sizes_in_kib(models), "target", SIZE_LOOKS, height=2.3)
    panels.set(ylim=(0, None)).set_ylabels("KiB")
    style.headed(panels.figure, title)
    return panels.figure


def sizes_in_kib(models: pd.DataFrame) -> pd.DataFrame:
    """A row per model, target sparsity and `name`, of SIZE_LOOKS: dense file, file, message, and the published
    formula."""
    formula = 4 * models["weights"] * (1 - models["sparsity"])
    sizes = (models["dense_file"], models["file"], models["message"], formula)
    named = dict(zip(SIZE_LOOKS, sizes, strict=True))
    table = models[["model", "target"]].assign(**named).melt(["model", "target"], var_name="name", value_name="y")
    return table.assign(y=table["y"] / 2**10)


def _over_sparsity(rows: pd.DataFrame, column: str, looks: Mapping[str, Mapping], **facets) -> FacetGrid:
    """A panel per model; the sparsities in `column` are at equal distances, since what matters is close to 1."""
    ticks = sorted(rows[column].unique())
    rows = rows.assign(x=rows[column].map(ticks.index))
    panels = style.line_panels(rows, looks, col="model", col_wrap=min(3, rows["model"].nunique()), **facets)
    for panel in panels.axes.flat:
        panel.set_xticks(range(len(ticks)), [f"{sparsity:g}" for sparsity in ticks], rotation=45)
    return panels.set(xlabel="sparsity", xlim=(-0.4, len(ticks) - 0.6))
