"""`follow`: a run that is looked at on the way, recorded like any other, in a folder of its own.

A row is the state *before* round `round`: 0, 1, ... T, where T is the end. An observer says what is looked at: the
terms of the bound (`bound/path.py`), or how local models merge (`merging.py`). Read before: `train/run.py`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pandas as pd

from ..config import Config
from ..core.sparsity import density
from ..core.state import ServerState
from ..methods.registry import Method
from ..records.catalogue import data_root
from ..records.provenance import provenance
from ..records.store import read_run, run_lock, save_table
from ..train.checkpoint import Progress, load_checkpoint, save_checkpoint
from ..train.evaluate import evaluate_state
from ..train.round import Clients
from ..train.run import advance, facts_of, running
from ..train.setup import prepare

COLUMNS = ("round", "accuracy", "sparsity", "lr", "penalty", "up_bytes", "down_bytes")
"""Of every followed run, before the observer's own and `seconds`. `lr` and `penalty` are those of the round to come,
bytes those of the round before; `accuracy`, on the test set, is there in the rows that are due; `seconds` is the row's
time."""

Observer = Callable[[ServerState, Clients, Method, Config, bool], dict]
"""(state, clients, method, configuration, is the row due: every `eval_every`-th, and the last) -> its columns."""


def follow(config: Config, folder: str | Path, observe: Observer, own: Sequence[str], **about) -> pd.DataFrame:
    """Run a configuration, look at its states on the way, and record `<run_id>.csv` and `.json` in `folder`.

    What is there already is returned; an interrupted run goes on from its last row that was due, to the same bits (but
    `seconds`). `about` is recorded, but is no part of the run's identity.

    Args:
        observe: gives the columns named by `own` for a state; empty where it leaves one out.

    Returns:
        T + 1 rows of COLUMNS, `own` and `seconds`.

    Raises:
        ValueError: bad input or damaged files; a loss is not finite. ClientFailure: as `run`.
    """
    config, folder = config.resolved(), Path(folder)
    if stored := read_run(folder, config.run_id):
        return stored[0]
    state, clients, method = prepare(config)  # bad input shows here, before anything is written
    path = folder / f"{config.run_id}.checkpoint"
    with closing(clients.workers), run_lock(folder, config.run_id), running(config):
        if stored := read_run(folder, config.run_id):  # by another process, while this one waited
            return stored[0]
        now = load_checkpoint(path, config, state.weights.device) if path.exists() else Progress(state)
        while len(now.rows) <= config.rounds:
            due = _add_row(now, clients, method, config, observe)
            if due and len(now.rows) <= config.rounds:
                save_checkpoint(path, now, config)
        facts = provenance(state.weights.device, clients.workers.slots, **facts_of(clients, config, now))
        rows = pd.DataFrame(now.rows, columns=[*COLUMNS, *own, "seconds"])
        save_table(folder, config, rows, **about, provenance=facts, skipped=now.skipped)
        path.unlink(missing_ok=True)
        return read_run(folder, config.run_id)[0]


def follow_all(configs: Sequence[Config], folder: Path, how: Callable[..., pd.DataFrame], **settings) -> None:
    """`how(config, folder, **settings)` for each in turn, a printed line for each; data is looked for as
    `train.run.train` does."""
    os.environ["FEDDIP_DATA"] = str(data_root())
    for number, config in enumerate(configs, 1):
        begin = time.monotonic()
        last = how(config, folder, **settings).iloc[-1]
        words = f"accuracy {last['accuracy']:.4f}, {time.monotonic() - begin:.0f} s"
        print(f"[{number}/{len(configs)}] {config.run_id}: {words}", flush=True)


def _add_row(now: Progress, clients: Clients, method: Method, config: Config, observe: Observer) -> bool:
    """Add the next row, after one more round but for the first; whether it was due."""
    begin = time.monotonic()
    if now.rows:
        advance(now, clients, method, config)
    state, t = now.state, now.state.round
    due = t % config.eval_every == 0 or t == config.rounds
    row = {"round": t, "sparsity": 1 - density(state.weights[: len(state.mask)] * state.mask)}
    row |= {"lr": config.lr_at(t), "penalty": method.penalty(t), "up_bytes": now.up_bytes, "down_bytes": now.down_bytes}
    row |= observe(state, replace(clients, memories=now.memories), method, config, due)
    if due:
        row["accuracy"] = evaluate_state(state, clients)["accuracy"]
    row["seconds"] = time.monotonic() - begin
    now.rows.append(row)
    now.wall_seconds += row["seconds"]
    now.up_bytes = now.down_bytes = 0
    return due
