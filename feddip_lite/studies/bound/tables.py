"""What recorded paths say of the bound: its terms, from a record.

Runs come as `records.names.describe` returns them (`recorded_paths`), with the columns of `path.record_path`.
"Typical" is said of the bound with the median gamma in place of the largest, which one checkpoint may decide.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd

from ...records.catalogue import own_start, recorded, shared_start
from ...records.names import splits
from .estimators import Bound, Estimates, assemble
from .path import ESTIMATES

SCHEDULES = {"theory": "theorem's setting", "exponential": "experiments' setting"}
"""What a run's `lr_schedule` makes of it."""
TERMS = tuple(item.name for item in fields(Bound))[1:]


def each_run(runs: pd.DataFrame) -> list[pd.DataFrame]:
    """The runs one by one: the theorem's setting first, IID first, then by preset and by R."""
    places = {"lr_schedule": list(SCHEDULES).index, "split": splits(runs).index}
    first = runs.drop_duplicates("run_id")
    first = first.assign(**{name: first[name].map(place) for name, place in places.items()})
    first = first.sort_values([*places, "preset", "mask_interval", "seed", "run_id"])
    return [runs[runs["run_id"] == run_id] for run_id in first["run_id"]]


def checkpoints(run: pd.DataFrame) -> pd.DataFrame:
    """The rows of a recorded path that have estimates."""
    return run[run["loss"].notna()]


def gamma_of(run: pd.DataFrame, typical: bool) -> float:
    """gamma of a run, without unit: the largest finite estimate, as the theorem asks for, or the median of these if
    `typical`; never below 1. Infinite estimates, where sampling noise hides the mean gradient, are left out."""
    found = run["dispersion"][np.isfinite(run["dispersion"])]
    return max(1.0, float(found.median() if typical else found.max()))


def bound_of(run: pd.DataFrame, *, typical: bool = False, printed: bool = False) -> Bound:
    """The bound of one run, for the largest gamma or a `typical` one, consistent or as `printed`.

    What pruning removed before round 0 is not in its sum: the theorem starts at the pruned model. In the theorem's
    setting L is that of the learning rate 1/(tL), unless a larger one was found.
    """
    first, removed = run.iloc[0], run["pruning_distance"].iloc[1:]
    path = [Estimates(**row) for row in checkpoints(run)[list(ESTIMATES)].to_dict("records")]
    sizes = {"participants": int(first["clients_per_round"]), "steps": int(first["local_steps"])}
    sizes |= {"smooth": first["smoothness"]} if first["lr_schedule"] == "theory" else {}
    return assemble(path, removed, **sizes, gamma=gamma_of(run, typical), printed=printed)


def recorded_paths(folder: Path | None = None) -> pd.DataFrame:
    """The recorded runs with estimates; where FedDIP's own start was not recorded yet, those of `shared_start`. Never
    both."""
    records = recorded("bound/lite", folder)
    own = own_start(records)
    return own if (own["label"] == "FedDIP").any() else shared_start(records)
