"""What recorded runs say: comparisons paired by seed, rankings, and the README's tables.

Statistics: 95 % Student t intervals over seeds; with fewer than three seeds the values alone, no interval, no verdict.
"""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from ..records.catalogue import RECORDED, comparable, main_runs
from ..records.names import labels, splits
from ..records.store import headline, read_run
from .markdown import table

NOTHING = "No recorded runs yet."
NOTE = (
    "Final accuracy: mean of the last ten evaluated rounds on the whole test set. `±`: half width of the 95 % Student "
    "t interval over seeds. Differences are paired by seed. n < 3: the values alone, no interval, no verdict. With a "
    "row per round and a mask every fifth, two of the ten choose one: there `memory` drops, to recover until the next."
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
    diverged, NaN, are counted and said."""
    values = np.asarray(values, dtype=float)
    if len(values) == 0:
        return "-"
    diverged, values = int(np.isnan(values).sum()), values[~np.isnan(values)]
    if len(values) == 0:
        return f"diverged (n={diverged})"
    mean, half = interval(values)
    count = f"(n={len(values)}{f', {diverged} diverged' if diverged else ''})"
    if np.isnan(half):
        return f"{', '.join(f'{value:{sign}.{digits}f}' for value in values)} {count}"
    return f"{mean:{sign}.{digits}f} ± {half:.{digits}f} {count}"


def results_table(results: pd.DataFrame) -> str:
    """The Markdown table of one setting, a row per partition and method."""
    top5 = [name for name in ("top5_accuracy",) if name in results and results[name].notna().any()]
    heads = ["method (preset)", "partition", "final accuracy", *["top-5 accuracy" for _ in top5], "measured sparsity"]
    heads += ["total MiB", "share of FedAvg's bytes", "accuracy minus FedAvg's"]
    rows, runs = [], headline(results)
    for split in splits(results):
        group = runs[runs["split"] == split]
        for label in labels(group):
            own = group[group["label"] == label].sort_values("seed")
            cells = [label, split, quantity(own["accuracy"]), *[quantity(own[name]) for name in top5]]
            cells += [mean_of(own["sparsity"], 4), mean_of(own["mib"], 1)]
            share = paired(group, label, "FedAvg", "mib", ratio=True)
            cells += [f"{share.mean():.3f}" if len(share) else "-"]
            cells += ["-" if label == "FedAvg" else quantity(paired(group, label, "FedAvg"), sign="+")]
            rows.append(cells)
    return table(heads, rows)


def mean_of(values: pd.Series, digits: int) -> str:
    """The mean of what is not NaN, "-" without any."""
    return f"{values.mean():.{digits}f}" if values.notna().any() else "-"


def circumstances(folder: Path, results: pd.DataFrame) -> str:
    """One line on where the numbers come from: seeds, data, device and versions, from the runs' provenance."""
    facts = [read_run(folder, run_id)[1]["provenance"] for run_id in results["run_id"].unique()]

    def each(get):
        return ", ".join(sorted({str(get(fact)) for fact in facts}))

    seeds = ", ".join(str(seed) for seed in sorted(results["seed"].unique()))
    data, device = each(lambda fact: fact["data"]["source"]), each(lambda fact: fact["device"])
    return f"Seeds: {seeds}. Data: {data}. Device: {device}, torch {each(lambda fact: fact['torch'])}."


def ranking(results: pd.DataFrame) -> str:
    """Markdown: each method's place by final accuracy, seed by seed, for one setting and partition, in order of the
    mean over the seeds that all have; and how well the seeds agree: Kendall's tau of each pair (1 = the same order, 0 =
    unrelated) over the methods that both have. A masked upload is the same model, so it has no place of its own."""
    results = results[results["changed"] != "upload"]
    accuracy, common = (by_seed(headline(some), "accuracy").T for some in (results, comparable(results)))
    accuracy = accuracy.loc[common.mean(axis=1).reindex(accuracy.index).sort_values(ascending=False).index]
    places = accuracy.rank(ascending=False).map(lambda place: "-" if np.isnan(place) else f"{place:.0f}")
    ranked = table(["method", *(f"seed {seed}" for seed in accuracy)], places.reset_index().to_numpy())
    agreeing = []
    for one, other in combinations(accuracy, 2):
        both = accuracy[[one, other]].dropna()
        if len(both) > 2:
            tau = stats.kendalltau(both[one], both[other]).statistic
            agreeing.append(f"{tau:.2f} (seeds {one} and {other}: {', '.join(labels(both.reset_index()))})")
    said = "Kendall's tau: " + "; ".join(agreeing) if agreeing else "No two seeds have three methods in common"
    return f"{ranked}\n\n{said}."


def frontier(results: pd.DataFrame) -> str:
    """Markdown: the methods of one setting and partition that no other beats in final accuracy and bytes at once,
    by their means over the seeds that all have."""
    results = comparable(results)
    if results.empty:
        return "No seed that all methods have."
    means = headline(results).groupby("label")[["accuracy", "mib"]].mean().sort_values("mib")
    best = means["accuracy"].cummax()
    front = means[(means["accuracy"] == best) & ~best.duplicated()]
    found = ", ".join(f"{label} ({row['accuracy']:.4f}, {row['mib']:.0f} MiB)" for label, row in front.iterrows())
    return f"No other method is more accurate for fewer bytes than: {found}."


def results_section(folder: Path) -> str:
    """Everything between the README's markers: a table per profile and setting, with its circumstances."""
    parts = []
    for profile in RECORDED:
        for group in main_runs(profile, folder).values():
            parts += [f"**{group['setting'].iloc[0]}** (profile `{profile}`)", results_table(group)]
            parts += [circumstances(folder / profile, group)]
    return "\n\n".join([*parts, NOTE] if parts else [NOTHING])
