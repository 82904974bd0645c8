"""Figures of what pruning saves: bytes of recorded runs; latency and file size from `measure.py`'s measurements.

A method has its look of `report/style.py`, a form of a model the same one everywhere.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from ...records.catalogue import comparable
from ...records.names import FAMILIES, family_of, labels
from ...records.store import HEADLINE_ROWS
from ...report import style
from ...report.style import INK, styled
from .tables import PUBLISHED, published_bytes

FORMULA = "published formula"
FORMULA_LOOK = {"color": INK, "marker": ".", "dashes": (1, 1)}


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
