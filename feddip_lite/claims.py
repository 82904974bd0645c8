"""What the sources claim, and what came out: `params/claims.yaml` says how each is judged, recorded runs judge."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from . import merging
from .cost_report import judged_clients
from .experiments import main_runs, recorded, splits
from .extremes import sparsity_sweep
from .report import quantity
from .results import HEADLINE_ROWS, headline, interval

HEADS = "claim | source | measured | ours, n seeds | verdict | notebook"
RULE = (
    "Verdict: a claim holds in a partition if the 95 % interval over seeds (differences and ratios paired by seed) "
    "lies wholly on the good side of its threshold. Reproduced: in every partition; partly: in some; not reproduced: "
    "in none, which does not say that the opposite was shown. Fewer than three seeds: the values, no verdict. Not "
    "tested at this scale: no recorded run measures it yet. For time and memory, a model stands for a partition and a "
    "repetition for a seed; where sparsities are compared, each stands for a partition. ‡ This rule was written down "
    "when its runs were known."
)


def claims_table(folder: Path, path: Path) -> str:
    """Markdown: a row per claim of the file `path`, from the recorded runs under `folder`, and the rule behind the
    verdicts. Links start from the checkout."""
    document = yaml.safe_load(path.read_text())
    setting = document["setting"]
    runs = main_runs(setting["profile"], folder).get(setting["runs"], pd.DataFrame(columns=["split", "run_id"]))
    everything = recorded(setting["profile"], folder)
    alike = everything[everything["setting"].isin(runs.get("setting", []))]  # ablations too
    swept = everything[everything["model"].astype(str) + "_" + everything["dataset"].astype(str) == setting["runs"]]
    sources = {"runs": summaries(alike), "sweep": by_sparsity(swept[swept["partition"] == "iid"])}
    sources["merging"] = merging.per_run(recorded(f"merging/{setting['profile']}", folder))
    sources["cost_cpu"] = judged_clients(folder.parent / "benchmarks")
    lines = [f"| {HEADS} |", "|" + " --- |" * 6, *(_row(claim, sources) for claim in document["claims"])]
    where = "".join(f"{words} (profile `{setting['profile']}`).\n\n" for words in runs.get("setting", [])[:1])
    return where + "\n".join([*lines, "", RULE])


def _row(claim: dict, sources: dict[str, pd.DataFrame]) -> str:
    measure, good, cells = claim.get("measure"), claim.get("good"), ["-", "-", "not tested at this scale"]
    if measure:
        rows = sources[measure.get("from", "runs")]
        by_split = {split: measured(rows[rows["split"] == split], measure) for split in splits(rows)}
        by_split = {split: values for split, values in by_split.items() if len(values)}
        cells[0] = in_words(measure, good)
        if by_split:
            sign, digits = "+" * (measure["by"] == "difference"), 6 if measure["column"] == "mask_overlap" else 4
            said = [f"{split}: {quantity(values, digits, sign)}" for split, values in by_split.items()]
            cells[1:] = ["; ".join(said), verdict(by_split.values(), **good)]
    link = f"[{claim['notebook'][:2]}](notebooks/{claim['notebook']}.ipynb)" if "notebook" in claim else "-"
    return "| " + " | ".join([claim["claim"] + " ‡" * claim.get("known", False), claim["source"], *cells, link]) + " |"


def measured(rows: pd.DataFrame, measure: dict) -> np.ndarray:
    """The values (n,) of a measure over the seeds that have all labels it names, in order of seeds.

    `rows` have `label`, `seed` and the measure's `column`: runs as `summaries` gives them, or a benchmark's record. Of
    several names in `to` the best counts, the largest value of the column, seed by seed.
    """
    table = rows.pivot_table(index="seed", columns="label", values=measure["column"]) if len(rows) else rows
    names = [measure["of"], *measure.get("to", [])]
    if not set(names) <= set(table):
        return np.empty(0)
    table = table[names].dropna()
    own = table[measure["of"]].to_numpy()
    if measure["by"] == "value":
        return own
    other = table[measure["to"]].max(axis=1).to_numpy()
    return own / other if measure["by"] == "ratio" else own - other


def summaries(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per run: `headline`'s; `mask_overlap`, the mean over the rounds that choose a mask, without the first,
    which replaces a random mask; and `end_minus_best`, the mean accuracy of the last ten evaluated rounds minus that of
    the best ten in a row."""
    rows = headline(runs).set_index("run_id")
    for run_id, run in runs.groupby("run_id"):
        accuracy = run.sort_values("round")["accuracy"]
        best = accuracy.rolling(min(HEADLINE_ROWS, len(accuracy))).mean().max()
        rows.loc[run_id, "end_minus_best"] = rows.loc[run_id, "accuracy"] - best
        chosen = run[(run["round"] > 0) & (run["round"] % pd.to_numeric(run["mask_interval"]) == 0)]
        rows.loc[run_id, "mask_overlap"] = chosen["mask_overlap"].mean()
    return rows


def by_sparsity(results: pd.DataFrame) -> pd.DataFrame:
    """The runs of a sparsity sweep, one row each, with a target sparsity in the place of a partition."""
    runs = sparsity_sweep(results)
    return runs.assign(split=[f"s = {target:g}" for target in runs["target_sparsity"]])


def verdict(by_partition: Iterable[np.ndarray], side: str, threshold: float | list[float]) -> str:
    """What `RULE` says of the values of each partition; `side` is "above" or "below" a threshold, or "between" two."""
    low, high = {"above": (threshold, np.inf), "below": (-np.inf, threshold)}.get(side) or threshold
    intervals = [interval(values) for values in by_partition]
    if any(np.isnan(half) for _, half in intervals):
        return "no verdict for n < 3"
    holds = [low < mean - half and mean + half < high for mean, half in intervals]
    return "reproduced" if all(holds) else "partly" if any(holds) else "not reproduced"


def in_words(measure: dict, good: dict) -> str:
    """A measure and its threshold, as a reader would say it."""
    words = {"mib": "total bytes", "peak_mib": "peak memory in training", "seconds": "seconds of local training"}
    column = words.get(measure["column"], measure["column"].replace("_", " "))
    of, to = measure["of"], measure.get("to", [])
    other = to[0] if len(to) == 1 else f"the best of {', '.join(to)}"
    what = {"difference": f"{of} - {other}", "ratio": f"{of} / {other}", "value": of}[measure["by"]]
    limit = " and ".join(f"{value:g}" for value in np.atleast_1d(good["threshold"]))
    return f"{column}: {what}, {good['side']} {limit}"
