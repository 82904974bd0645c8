"""`follow`: a run with the bound's estimates on the way, recorded like any other, in a folder of its own.

A row is the state *before* round `round`: 0, 1, ... T, where T is the end. Each has what pruning removes; every
`eval_every`-th and the last have the estimates of `bound.Estimates`, empty elsewhere. In the theorem's setting
(lr_schedule "theory") f is what clients minimise, this round's penalty and the weight decay included; else it is the
cross-entropy. Read before: `bound.py`, `engine.py`; after: `bound_report.py`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, fields
from pathlib import Path

import pandas as pd

from .bound import Estimates, estimate, pruning_distance
from .checkpoint import Progress, load_checkpoint, save_checkpoint
from .config import Config
from .engine import advance, facts_of, running
from .experiments import data_root
from .federation import prepare
from .methods import Method
from .results import provenance, read_run, run_lock, save_table
from .server import Clients, evaluate_state
from .sparsity import density

ESTIMATES = tuple(item.name for item in fields(Estimates))
COLUMNS = ("round", "accuracy", "sparsity", "lr", "penalty", "up_bytes", "down_bytes", "local_steps", *ESTIMATES[1:])
COLUMNS += ("seconds",)
"""`lr` and `penalty` are those of the round to come, bytes those of the round before; `local_steps` is E_l, the most
steps of a client; `loss` is f(w') on the training set, `accuracy` that on the test set; `seconds` the row's time."""
SETTINGS = {"batches": 20, "curvature_samples": 1024, "iterations": 30}
"""What `bound.estimate` is called with."""


def follow(config: Config, folder: str | Path, *, progress: bool = True, **settings) -> pd.DataFrame:
    """Run a configuration, estimate the bound's terms on the way, and record `<run_id>.csv` and `.json` in `folder`.

    What is there already is returned; an interrupted run goes on from its last estimates, to the same bits (but
    `seconds`). `progress` shows a bar for each set of estimates; `settings` change SETTINGS; they are
    recorded, but are no part of the run's identity.

    Returns:
        T + 1 rows of COLUMNS.

    Raises:
        ValueError: bad input or damaged files; a loss is not finite. ClientFailure: as `run`.
    """
    config, folder, settings = config.resolved(), Path(folder), {**SETTINGS, **settings}
    if stored := read_run(folder, config.run_id):
        return stored[0]
    state, clients, method = prepare(config)  # bad input shows here, before anything is written
    path = folder / f"{config.run_id}.checkpoint"
    with closing(clients.workers), run_lock(folder, config.run_id), running(config):
        if stored := read_run(folder, config.run_id):  # by another process, while this one waited
            return stored[0]
        now = load_checkpoint(path, config, state.weights.device) if path.exists() else Progress(state)
        while len(now.rows) <= config.rounds:
            _observe(now, clients, method, config, progress=progress, **settings)
            if "loss" in now.rows[-1] and len(now.rows) <= config.rounds:
                save_checkpoint(path, now, config)
        facts = provenance(state.weights.device, clients.workers.slots, **facts_of(clients, config, now))
        rows = pd.DataFrame(now.rows, columns=list(COLUMNS))
        about = {"objective": objective(config), "estimates": settings}
        save_table(folder, config, rows, **about, provenance=facts, skipped=now.skipped)
        path.unlink(missing_ok=True)
        return read_run(folder, config.run_id)[0]


def follow_all(configs: Sequence[Config], folder: Path, **settings) -> None:
    """`follow` each in turn, a printed line for each; data is looked for as `experiments.train` does."""
    os.environ["FEDDIP_DATA"] = str(data_root())
    for number, config in enumerate(configs, 1):
        begin = time.monotonic()
        last = follow(config, folder, **settings).iloc[-1]
        words = f"accuracy {last['accuracy']:.4f}, {time.monotonic() - begin:.0f} s"
        print(f"[{number}/{len(configs)}] {config.run_id}: {words}", flush=True)


def _observe(now: Progress, clients: Clients, method: Method, config: Config, **settings) -> None:
    """Add the next row: after one more round, but for the first."""
    begin = time.monotonic()
    if now.rows:
        advance(now, clients, method, config)
    state, t = now.state, now.state.round
    prunable, strength = state.weights[: len(state.mask)], method.penalty(t)
    error, distance = pruning_distance(prunable, state.mask)
    row = {"round": t, "sparsity": 1 - density(prunable * state.mask), "lr": config.lr_at(t), "penalty": strength}
    row |= {"up_bytes": now.up_bytes, "down_bytes": now.down_bytes, "local_steps": _most_steps(clients, config)}
    row |= {"pruning_error": error, "pruning_distance": distance}
    if t % config.eval_every == 0 or t == config.rounds:
        within = {"penalty": strength, "weight_decay": config.weight_decay} if _theory(config) else {}
        row |= asdict(estimate(state, clients, config, **within, **settings))
        row["accuracy"] = evaluate_state(state, clients)["accuracy"]
    row["seconds"] = time.monotonic() - begin
    now.rows.append(row)
    now.wall_seconds += row["seconds"]
    now.up_bytes = now.down_bytes = 0


def objective(config: Config) -> str:
    """In words, what f is in a run of this configuration."""
    return "cross-entropy + penalty + weight decay" if _theory(config) else "cross-entropy"


def _theory(config: Config) -> bool:
    return config.lr_schedule == "theory"


def _most_steps(clients: Clients, config: Config) -> int:
    return config.local_epochs * max(-(-len(shard) // config.batch_size) for shard in clients.train)
