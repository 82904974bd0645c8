"""What recorded runs say: intervals, comparisons paired by seed, rankings.

Statistics: 95 % Student t intervals over seeds; with fewer than three seeds the values alone, no interval, no verdict.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from scipy import stats

from ..records.catalogue import rows_choosing_masks
from ..records.store import HEADLINE_ROWS, headline


def summaries(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per run: `headline`'s; `mask_overlap`, the mean over the rows that choose a mask, without the first, which
    replaces the mask that the run began with; `end_minus_best`, the mean accuracy of the last ten evaluated rounds
    minus that of the best ten in a row; `dip_at_choice`, over those ten, the mean accuracy of rows that choose a mask
    minus that of the others; `regrown`, how many weights returned in the whole run; and `stay_rounds`, how many rounds
    a returned weight stays on average, those to the end that are kept to the end. NaN of a run that diverged, and where
    there is nothing to take a mean of or the record is older than the column `returned`."""
    rows, runs = headline(runs).set_index("run_id"), runs.sort_values("round", ignore_index=True)
    chosen = rows_choosing_masks(runs)
    runs["returned"] = runs.get("returned", np.nan)
    accuracy = runs.groupby("run_id")["accuracy"]
    best = accuracy.agg(lambda own: own.rolling(min(HEADLINE_ROWS, len(own))).mean().max())
    replaced = chosen[chosen.groupby("run_id").cumcount() > 0].groupby("run_id")["mask_overlap"].mean()
    final = runs.assign(chooses=runs.index.isin(chosen.index)).groupby("run_id").tail(HEADLINE_ROWS)
    means = final.pivot_table(index="run_id", columns="chooses", values="accuracy").reindex(columns=[False, True])
    since = runs.groupby("run_id")["round"].diff().fillna(runs["round"] + 1)  # rounds that a row stands for
    stays = (runs["returned"] * since).groupby(runs["run_id"]).sum(min_count=1)
    regrown = runs.groupby("run_id")["regrown"].sum().where(rows["diverged"] == "")
    return rows.assign(
        end_minus_best=rows["accuracy"] - best,
        dip_at_choice=means[True] - means[False],
        mask_overlap=replaced,
        regrown=regrown,
        stay_rounds=stays / regrown.replace(0, np.nan),
    )


def interval(values) -> tuple[float, float]:
    """(mean, half width of the 95 % Student t interval of the mean) over seeds; the width is NaN for n < 3.

    NaN, a run that diverged, is no value; without any value both are NaN."""
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    if len(values) < 3:
        return float(values.mean()) if len(values) else math.nan, math.nan
    return float(values.mean()), float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))


def by_seed(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """A column of runs, one row each, as a table: a row per `seed`, a column per `label`.

    Raises:
        ValueError: a label has two runs under one seed, so they differ in what `label` does not say.
    """
    twice = rows[rows.duplicated(["seed", "label"])]
    if len(twice):
        label, seed = twice[["label", "seed"]].iloc[0]
        raise ValueError(f"{label}: two runs under seed {seed}; compare runs of one setting and partition")
    return rows.pivot(index="seed", columns="label", values=column)


def paired(runs: pd.DataFrame, label: str, reference: str, column: str = "accuracy", ratio: bool = False) -> np.ndarray:
    """`label` minus `reference` (or divided by it) in a column of `headline`, for every seed that has both; (n,)."""
    both = by_seed(runs[runs["label"].isin([label, reference])], column)
    if label not in both or reference not in both:
        return np.empty(0)
    both = both.dropna()
    own, other = both[label].to_numpy(), both[reference].to_numpy()
    return own / other if ratio else own - other


def quantity(values, digits: int = 4, sign: str = "") -> str:
    """Values over seeds in words: `mean ± half width (n=3)`; below three seeds the values; "-" for none. Runs that
    diverged, NaN, are counted and said. What rounds to zero has no minus sign."""
    values = np.asarray(values, dtype=float)
    if len(values) == 0:
        return "-"
    diverged, values = int(np.isnan(values).sum()), values[~np.isnan(values)]
    if len(values) == 0:
        return f"diverged (n={diverged})"
    mean, half = interval(values)
    count = f"(n={len(values)}{f', {diverged} diverged' if diverged else ''})"
    if np.isnan(half):
        return f"{', '.join(f'{value:{sign}z.{digits}f}' for value in values)} {count}"
    return f"{mean:{sign}z.{digits}f} ± {half:.{digits}f} {count}"


def mean_of(values: pd.Series, digits: int) -> str:
    """The mean of what is not NaN, "-" without any."""
    return f"{values.mean():.{digits}f}" if values.notna().any() else "-"
