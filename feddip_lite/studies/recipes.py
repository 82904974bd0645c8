"""Which method, sent how, for a budget of bytes? Recorded forms of the main comparison, against FedAvg stopped there.

Results come as `records.names.describe` returns them.
"""

from __future__ import annotations

import pandas as pd

from ..config import Config
from ..records.names import label_of, labels, splits
from ..records.store import headline
from ..report.statistics import interval, paired, quantity
from .equal_bytes import stopped

_KEPT = {"upload": "masked", "mask_source": "masked_average"}
_BITS = {"up": "qsgd:8:512", "down": "qsgd:8:512"}
_MEMORY = {"preset": "memory", "up_pruned": "ternary:512", **_BITS}
RECIPES = {
    "FedDIP X4": Config(method_options=_KEPT, **_BITS),
    "FedDIP X4t": Config(method_options={"reentry": "zero"}, **_MEMORY),
    "FedDIP X4t, from memory": Config(**_MEMORY),
    "FedDIP X6": Config(method_options=_KEPT, mask_cache=True, **_BITS),
    "FedDIP, masked average": Config(method_options=_KEPT),
    "FedDIP, masked": Config(method_options={"upload": "masked"}),
    "FedDIP, screened": Config(method_options={"upload": "screened"}),
    "FedPAQ": Config(method="fedavg", up=_BITS["up"]),
    "Fed-EF": Config(method="fedavg", up="topk:0.01", up_feedback="ef"),
    "FedSparsify-Global, 8 bits": Config(method="fedsparsify_global", **_BITS),
    "SNIP, 8 bits": Config(method="snip", **_BITS),
}
"""What docs/bytes.md calls them."""
BUDGETS = (0.05, 0.1, 0.2, 0.35, 0.65)
"""Shares of FedAvg's bytes."""
DENSE = "FedAvg"


def forms(results: pd.DataFrame, usual: pd.DataFrame) -> pd.DataFrame:
    """The runs of the `usual` comparison (`main_runs`), and those of `results` that travel otherwise and have every
    partition and seed of the usual ones; under their names in RECIPES."""
    named = {label_of(config): name for name, config in RECIPES.items()}
    others = results[results["setting"].isin(usual["setting"]) & ~results["run_id"].isin(usual["run_id"])]
    coded = others[others["label"].isin(named)]
    wanted, found = _places(usual), {label: _places(own) for label, own in coded.groupby("label")}
    coded = coded[coded["label"].map(found).map(wanted.issubset).astype(bool)]
    runs = pd.concat([usual, coded])
    return runs.assign(label=runs["label"].map(lambda label: named.get(label, label)))


def _places(runs: pd.DataFrame) -> set[tuple[str, int]]:
    return set(zip(runs["split"], runs["seed"], strict=True))


def advice_table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per partition and budget, of FedAvg's bytes under the same seed: the form of `forms` that is most accurate
    among those that cost no more (if none does, the cheapest in brackets), what it costs, and its final accuracy minus
    FedAvg's; beside it FedAvg, stopped when the budget is spent. Differences are paired by seed, means with 95 %
    intervals."""
    rows = []
    for split in splits(runs):
        own = runs[runs["split"] == split]
        finals = headline(own)
        gains = {label: paired(finals, label, DENSE) for label in labels(finals) if label != DENSE}
        costs = {label: paired(finals, label, DENSE, "mib", ratio=True) for label in gains}
        known = [label for label in gains if len(costs[label])]
        for budget in BUDGETS if known else ():
            within = [label for label in known if costs[label].max() <= budget]
            if within:
                shown = said = max(within, key=lambda label: interval(gains[label])[0])
            else:
                shown = min(known, key=lambda label: costs[label].mean())
                said = f"none ({shown})"
            row = {"partition": split, "at most": f"{budget:.0%}", "most accurate": said}
            row["of FedAvg's bytes"] = f"{costs[shown].mean():.3f}"
            row["accuracy minus FedAvg's"] = quantity(gains[shown], sign="+")
            row["FedAvg, stopped there"] = quantity(losses(own[own["label"] == DENSE], budget), sign="+")
            rows.append(row)
    return pd.DataFrame(rows)


def losses(dense: pd.DataFrame, budget: float) -> list[float]:
    """Accuracy of each run, stopped when a share of its bytes is spent, minus that at its end."""
    found = []
    for _, run in dense.groupby("seed"):
        whole = run["mib"].max()
        early, end = (stopped(run, mib)["accuracy"].mean() for mib in (budget * whole, whole))
        found.append(early - end)
    return found
