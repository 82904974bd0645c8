"""What a dense model reaches for FedDIP's bytes: FedAvg stopped early, planned for fewer rounds, or with fewer weights.

Results come as `records.names.describe` returns them.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from ..records.names import splits
from ..records.store import HEADLINE_ROWS, headline
from ..report import style
from ..report.style import VERMILION, styled

STOPPED, SHORTER, NARROWER = "FedAvg, stopped", "FedAvg, fewer rounds", "FedAvg, narrower"
FORMS = ("FedAvg", "FedDIP", STOPPED, SHORTER, NARROWER)
_FREE = ["setting", "rounds", "lr_decay", "width"]  # what tells the dense forms apart


def equal_bytes(results: pd.DataFrame, usual: pd.DataFrame) -> pd.DataFrame:
    """A row per run and form of FedAvg, `label` one of FORMS: final `accuracy`, and `mib` in all.

    Args:
        results: recorded runs. usual: those of them that FedDIP is compared with otherwise (`main_runs`).
    """
    rows = headline(usual[usual["label"].isin(["FedAvg", "FedDIP"])])
    spent = rows[rows["label"] == "FedDIP"].set_index(["split", "seed"])["mib"]
    dense = headline(results[(results["label"] == "FedAvg") & ~results["run_id"].isin(usual["run_id"])])
    same = usual.iloc[0]
    for label, free in ((SHORTER, ["rounds", "lr_decay"]), (NARROWER, ["width"])):
        fixed = [name for name in ("model", "dataset", "validation", "initial_lr", *_FREE[1:]) if name not in free]
        own = dense[(dense[fixed] == same[fixed]).all(axis=1)]
        rows = pd.concat([rows, own.assign(label=label)])
    for (split, seed), run in usual[usual["label"] == "FedAvg"].groupby(["split", "seed"]):
        if (split, seed) in spent.index:
            rows = pd.concat([rows, stopped(run, spent[split, seed]).assign(label=STOPPED)])
    return rows.reset_index(drop=True)


def stopped(run: pd.DataFrame, mib: float) -> pd.DataFrame:
    """The last row of a run that ends when so many MiB are spent, `accuracy` the mean of its last ten rows."""
    until = run[run["mib"] <= mib].sort_values("round")
    return until.tail(1).assign(accuracy=until["accuracy"].tail(HEADLINE_ROWS).mean())


@styled
def for_equal_bytes(rows: pd.DataFrame, title: str) -> Figure:
    """Final accuracy of each form, a panel per partition, a point per seed."""
    names = splits(rows)
    figure, axes = style.grid(1, len(names), 3.0)
    for panel, split in zip(axes[0], names, strict=True):
        own = rows[rows["split"] == split].assign(name="runs")
        order = [name for name in FORMS if name in set(own["label"])]
        style.over_seeds(own, "accuracy", "label", {"runs": {"color": VERMILION, "marker": "D"}}, panel, order=order)
        panel.set(xlabel="final test accuracy", ylabel="")
        panel.set_title(split, loc="left")
    usual = rows[rows["label"] == "FedDIP"]["setting"].iloc[0]
    style.headed(figure, title, f"{usual}; bars: 95 % intervals over seeds")
    return figure
