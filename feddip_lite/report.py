"""What recorded runs say: comparisons paired by seed, verdicts on the slides' claims, and the README's tables.

Statistics: 95 % Student t intervals over seeds; with fewer than three seeds the values alone, no interval, no verdict.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from .experiments import PROFILES, comparable, labels, main_runs, splits
from .results import headline, interval, read_run

CLAIMS = (  # column, method, reference, claim of the slides, supporting side, verdict if an interval has both sides
    ("accuracy", "FedDIP", "FedAvg", "as accurate as FedAvg at this sparsity", +1, "no loss shown and no gain"),
    ("accuracy", "FedDIP", "FedDP", "the growing penalty helps", +1, "not reproduced, no gain shown"),
    ("mib", "FedDIP", "FedAvg", "fewer bytes travel than with FedAvg", -1, "not reproduced, no saving shown"),
)
NOTHING = "No recorded runs yet."
NOTE = (
    "Final accuracy: mean of the last ten evaluated rounds on the whole test set. `±`: half width of the 95 % Student "
    "t interval over seeds. Differences are paired by seed. n < 3: the values alone, no interval, no verdict."
)


def paired(runs: pd.DataFrame, label: str, reference: str, column: str = "accuracy", ratio: bool = False) -> np.ndarray:
    """`label` minus `reference` (or divided by it) in a column of `headline`, for every seed that has both; (n,)."""
    by_seed = runs.pivot_table(index="seed", columns="label", values=column)
    if label not in by_seed or reference not in by_seed:
        return np.empty(0)
    both = by_seed[[label, reference]].dropna()
    own, other = both[label].to_numpy(), both[reference].to_numpy()
    return own / other if ratio else own - other


def quantity(values, digits: int = 4, sign: str = "") -> str:
    """Values over seeds in words: `mean ± half width (n=3)`; below three seeds the values; "-" for none."""
    if len(values) == 0:
        return "-"
    mean, half = interval(values)
    if np.isnan(half):
        return f"{', '.join(f'{value:{sign}.{digits}f}' for value in values)} (n={len(values)})"
    return f"{mean:{sign}.{digits}f} ± {half:.{digits}f} (n={len(values)})"


def agreement(results: pd.DataFrame) -> str:
    """Markdown: what agrees and what disagrees with the slides' claims, a list per setting and partition.

    The rule: a verdict needs three seeds and a 95 % interval of the paired differences (or shares of bytes) that lies
    wholly on one side of no difference.
    """
    parts, runs = [], headline(results)
    for setting in results["setting"].unique():
        for split in splits(results[results["setting"] == setting]):
            group = runs[(runs["setting"] == setting) & (runs["split"] == split)]
            lines = [_claim_line(group, *claim) for claim in CLAIMS]
            parts.append("\n".join([f"*{setting}; {split}:*\n", *lines]))
    return "\n\n".join(parts) or NOTHING


def _claim_line(
    group: pd.DataFrame, column: str, label: str, reference: str, claim: str, side: int, between: str
) -> str:
    share = column == "mib"
    values = paired(group, label, reference, column, ratio=share)
    what = f"{label} / {reference}, total bytes" if share else f"{label} - {reference}, accuracy"
    if len(values) == 0:
        return f'- {what}: not run. Claim "{claim}": no verdict.'
    mean, half = interval(values)
    distance = side * (mean - share)
    if np.isnan(half):
        verdict = "no verdict for n < 3"
    elif abs(distance) > half:
        verdict = "agrees" if distance > 0 else "disagrees"
    else:
        verdict = f"{between} (the interval includes {int(share)})"
    return f'- {what}: {quantity(values, sign="" if share else "+")}. Claim "{claim}": {verdict}.'


def results_table(results: pd.DataFrame) -> str:
    """The Markdown table of one setting, a row per partition and method."""
    top5 = [name for name in ("top5_accuracy",) if name in results and results[name].notna().all()]
    heads = ["method (preset)", "partition", "final accuracy", *["top-5 accuracy" for _ in top5], "measured sparsity"]
    heads += ["total MiB", "share of FedAvg's bytes", "accuracy minus FedAvg's"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    runs = headline(results)
    for split in splits(results):
        group = runs[runs["split"] == split]
        for label in labels(group):
            own = group[group["label"] == label].sort_values("seed")
            cells = [label, split, quantity(own["accuracy"]), *[quantity(own[name]) for name in top5]]
            cells += [f"{own['sparsity'].mean():.4f}", f"{own['mib'].mean():.1f}"]
            share = paired(group, label, "FedAvg", "mib", ratio=True)
            cells += [f"{share.mean():.3f}" if len(share) else "-"]
            cells += ["-" if label == "FedAvg" else quantity(paired(group, label, "FedAvg"), sign="+")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def circumstances(folder: Path, results: pd.DataFrame) -> str:
    """One line on where the numbers come from: seeds, data, device and versions, from the runs' provenance."""
    facts = [read_run(folder, run_id)[1]["provenance"] for run_id in results["run_id"].unique()]

    def each(get):
        return ", ".join(sorted({str(get(fact)) for fact in facts}))

    seeds = ", ".join(str(seed) for seed in sorted(results["seed"].unique()))
    data, device = each(lambda fact: fact["data"]["source"]), each(lambda fact: fact["device"])
    return f"Seeds: {seeds}. Data: {data}. Device: {device}, torch {each(lambda fact: fact['torch'])}."


def ranking(results: pd.DataFrame) -> str:
    """Markdown: each method's place by final accuracy, seed by seed, for one setting and partition, and how well the
    seeds agree: Kendall's tau of each pair (1 = the same order, 0 = unrelated) over the methods that both have."""
    runs = headline(results)
    accuracy = runs.pivot_table(index="label", columns="seed", values="accuracy")
    accuracy = accuracy.loc[accuracy.mean(axis=1).sort_values(ascending=False).index]
    places = accuracy.rank(ascending=False).map(lambda place: "-" if np.isnan(place) else f"{place:.0f}")
    lines = [
        "| method | " + " | ".join(f"seed {seed}" for seed in accuracy) + " |",
        "|" + " --- |" * (1 + len(places.columns)),
    ]
    lines += [f"| {label} | {' | '.join(row)} |" for label, row in zip(places.index, places.to_numpy(), strict=True)]
    agreeing = []
    for one, other in combinations(accuracy, 2):
        both = accuracy[[one, other]].dropna()
        if len(both) > 2:
            tau = stats.kendalltau(both[one], both[other]).statistic
            agreeing.append(f"{tau:.2f} (seeds {one} and {other}, {len(both)} methods)")
    said = "Kendall's tau: " + ", ".join(agreeing) if agreeing else "One seed so far: nothing to compare"
    return "\n".join([*lines, "", f"{said}."])


def frontier(results: pd.DataFrame) -> str:
    """Markdown: the methods of one setting and partition that no other beats in final accuracy and bytes at once,
    by their means over the seeds that all have."""
    means = headline(comparable(results)).groupby("label")[["accuracy", "mib"]].mean().sort_values("mib")
    best = means["accuracy"].cummax()
    front = means[(means["accuracy"] == best) & ~best.duplicated()]
    found = ", ".join(f"{label} ({row['accuracy']:.4f}, {row['mib']:.0f} MiB)" for label, row in front.iterrows())
    return f"No other method is more accurate for fewer bytes than: {found}."


def results_section(folder: Path) -> str:
    """Everything between the README's markers: a table per profile and setting, with its circumstances."""
    parts = []
    for profile in PROFILES:
        for group in main_runs(profile, folder).values():
            parts += [f"**{group['setting'].iloc[0]}** (profile `{profile}`)", results_table(group)]
            parts += [circumstances(folder / profile, group)]
    return "\n\n".join([*parts, NOTE] if parts else [NOTHING])
