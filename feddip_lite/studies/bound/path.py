"""The convergence bound along a run: its estimates at the states that are due, what pruning removes at all of them.

In the theorem's setting (lr_schedule "theory") f is what clients minimise, this round's penalty and the weight decay
included; else it is the cross-entropy. Read before: `estimators.py`, `../trajectory.py`; after: `tables.py`.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path

import pandas as pd

from ...config import Config
from ...train.observe import Run
from .. import trajectory
from .estimators import Estimates, estimate, pruning_distance

ESTIMATES = tuple(item.name for item in fields(Estimates))
PATH_COLUMNS = (*trajectory.STATE_COLUMNS, "local_steps", *ESTIMATES[1:], "seconds")
"""`local_steps` is E_l, the most steps of a client; `loss` is f(w') on the training set."""
SAMPLING = {"batches": 20, "curvature_samples": 1024, "iterations": 30}
"""What `estimators.estimate` is called with."""


class BoundPath(trajectory.Trajectory):
    """The terms of the bound at the states of a run. `progress` shows a bar for each set of estimates; `sampling` as
    SAMPLING."""

    columns = PATH_COLUMNS[len(trajectory.STATE_COLUMNS) : -1]

    def __init__(self, progress: bool, **sampling):
        self.progress, self.sampling = progress, sampling

    def state_columns(self, run: Run, due: bool) -> dict[str, float]:
        state, config = run.state, run.config
        error, distance = pruning_distance(state.weights[: len(state.mask)], state.mask)
        steps = config.local_epochs * max(-(-len(shard) // config.batch_size) for shard in run.clients.train)
        row = {"local_steps": steps, "pruning_error": error, "pruning_distance": distance}
        if not due:
            return row
        strength = run.method.penalty(state.round)
        within = {"penalty": strength, "weight_decay": config.weight_decay} if _theory(config) else {}
        found = estimate(state, run.clients, config, progress=self.progress, **within, **self.sampling)
        return row | asdict(found)


def record_path(config: Config, folder: str | Path, *, progress: bool = True, **sampling) -> pd.DataFrame:
    """`record_trajectory` of a `BoundPath`: T + 1 rows of PATH_COLUMNS, and its errors. `sampling` changes SAMPLING, is
    recorded, but no part of the run's id."""
    sampling = {**SAMPLING, **sampling}
    path = BoundPath(progress, **sampling)
    objective = "cross-entropy" + " + penalty + weight decay" * _theory(config)
    return trajectory.record_trajectory(config, folder, path, objective=objective, estimates=sampling)


def _theory(config: Config) -> bool:
    return config.lr_schedule == "theory"
