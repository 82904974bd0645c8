"""`follow`: a run with the bound's estimates on the way.

Every row has what pruning removes; those that are due have `estimators.Estimates`, empty elsewhere. In the
theorem's setting (lr_schedule "theory") f is what clients minimise, this round's penalty and the weight decay included;
else it is the cross-entropy. Read before: `estimators.py`, `../followed.py`; after: `tables.py`.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path

import pandas as pd

from ...config import Config
from ...core.state import ServerState
from ...methods.registry import Method
from ...studies import followed
from ...train.round import Clients
from .estimators import Estimates, estimate, pruning_distance

ESTIMATES = tuple(item.name for item in fields(Estimates))
COLUMNS = (*followed.COLUMNS, "local_steps", *ESTIMATES[1:], "seconds")
"""`local_steps` is E_l, the most steps of a client; `loss` is f(w') on the training set."""
SETTINGS = {"batches": 20, "curvature_samples": 1024, "iterations": 30}
"""What `estimators.estimate` is called with."""


def follow(config: Config, folder: str | Path, *, progress: bool = True, **settings) -> pd.DataFrame:
    """`followed.follow`, with the bound's terms for an observer.

    `progress` shows a bar for each set of estimates; `settings` change SETTINGS; they are recorded, but are no part of
    the run's identity.

    Returns:
        T + 1 rows of COLUMNS.

    Raises:
        ValueError: bad input or damaged files; a loss is not finite. ClientFailure: as `run`.
    """
    settings = {**SETTINGS, **settings}

    def observe(state: ServerState, clients: Clients, method: Method, config: Config, due: bool) -> dict:
        strength = method.penalty(state.round)
        error, distance = pruning_distance(state.weights[: len(state.mask)], state.mask)
        row = {"local_steps": _most_steps(clients, config), "pruning_error": error, "pruning_distance": distance}
        within = {"penalty": strength, "weight_decay": config.weight_decay} if _theory(config) else {}
        more = asdict(estimate(state, clients, config, progress=progress, **within, **settings)) if due else {}
        return row | more

    return followed.follow(
        config, folder, observe, COLUMNS[len(followed.COLUMNS) : -1], objective=objective(config), estimates=settings
    )


def objective(config: Config) -> str:
    """In words, what f is in a run of this configuration."""
    return "cross-entropy + penalty + weight decay" if _theory(config) else "cross-entropy"


def _theory(config: Config) -> bool:
    return config.lr_schedule == "theory"


def _most_steps(clients: Clients, config: Config) -> int:
    return config.local_epochs * max(-(-len(shard) // config.batch_size) for shard in clients.train)
