"""A run that is looked at on the way, recorded in a folder of its own: a row per *state*, 0, 1, ... T.

Row t describes the state before round t, T is the end. What is looked at says a `Trajectory` of its own: the terms of
the bound (`bound/path.py`), or how local models merge (`merging.py`). Read before: `train/observe.py`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ..config import Config
from ..core.sparsity import density
from ..records.catalogue import data_root
from ..records.store import save_table
from ..train.observe import Observer, Run
from ..train.recording import Recording, facts_of
from ..train.round import RoundRecord
from ..train.run import execute

STATE_COLUMNS = ("round", "accuracy", "sparsity", "lr", "penalty", "up_bytes", "down_bytes")
"""Of every trajectory, before its own and `seconds`. `lr` and `penalty` are those of the round to come, bytes those of
the round before; `accuracy`, on the test set, is there in the rows that are due; `seconds` is the row's time."""


class Trajectory(Observer):
    """The rows of a run's states: STATE_COLUMNS and, by `state_columns` and `round_columns`, what a study adds.

    A row begins with its state and is completed by the round that follows; so both may look, and what a checkpoint
    holds is enough to go on from.
    """

    name = "trajectory"
    columns: Sequence[str] = ()

    def state_columns(self, run: Run, due: bool) -> dict[str, float]:
        """What is to be said of the present state, before its round; `due`: it is one that is evaluated."""
        return {}

    def round_columns(self, run: Run, record: RoundRecord) -> dict[str, float]:
        """What is to be said, in the row of the state before, of a round that began with a state that was due."""
        return {}

    def rows(self, run: Run) -> list[dict]:
        """The rows so far."""
        return run.progress.observed.setdefault(self.name, [])

    def started(self, run: Run) -> None:
        if not self.rows(run):
            self._add_row(run, time.monotonic(), up_bytes=0, down_bytes=0)
        self.last = time.monotonic()

    def round_done(self, run: Run, record: RoundRecord) -> None:
        before = self.rows(run)[-1]
        if "accuracy" in before:
            before |= self.round_columns(run, record)
        self._add_row(run, self.last, up_bytes=record.up_bytes, down_bytes=record.down_bytes)
        self.last = time.monotonic()

    def _add_row(self, run: Run, begin: float, **travelled: int) -> None:
        state, t, due = run.state, run.state.round, run.is_due()
        row = {"round": t, "sparsity": 1 - density(state.weights[: len(state.mask)] * state.mask)}
        row |= {"lr": run.config.lr_at(t), "penalty": run.method.penalty(t), **travelled}
        row |= self.state_columns(run, due)
        if due:
            row["accuracy"] = run.metrics()["accuracy"]
        row["seconds"] = time.monotonic() - begin
        self.rows(run).append(row)


@dataclass(frozen=True)
class Table(Recording):
    """The record of a trajectory: `<run_id>.csv` with its rows, and `.json`; `about` is recorded, too."""

    trajectory: Trajectory
    about: Mapping

    def save(self, run: Run, diverged: Mapping | None = None) -> None:
        if diverged:  # there is no bound, and no merging, to speak of
            return
        rows = pd.DataFrame(self.trajectory.rows(run), columns=[*STATE_COLUMNS, *self.trajectory.columns, "seconds"])
        save_table(self.folder, run.config, rows, **self.about, provenance=facts_of(run), skipped=run.progress.skipped)


def record_trajectory(config: Config, folder: str | Path, trajectory: Trajectory, **about) -> pd.DataFrame:
    """Run a configuration, look at its states on the way, and record `<run_id>.csv` and `.json` in `folder`.

    What is there already is returned; an interrupted run goes on from its checkpoint, to the same bits (but `seconds`).
    `about` is recorded, but is no part of the run's identity.

    Returns:
        T + 1 rows of STATE_COLUMNS, the trajectory's own columns and `seconds`.

    Raises:
        ValueError: bad input or damaged files; a loss is not finite. ClientFailure: as `run`.
    """
    table = Table(Path(folder), trajectory, about)
    return execute(config, table, [trajectory], checkpoint_every=config.eval_every)


def record_all(configs: Sequence[Config], folder: Path, how: Callable[..., pd.DataFrame], **settings) -> None:
    """`how(config, folder, **settings)` for each in turn, a printed line for each; data is looked for as
    `train.run.train` does."""
    os.environ["FEDDIP_DATA"] = str(data_root())
    for number, config in enumerate(configs, 1):
        begin = time.monotonic()
        last = how(config, folder, **settings).iloc[-1]
        words = f"accuracy {last['accuracy']:.4f}, {time.monotonic() - begin:.0f} s"
        print(f"[{number}/{len(configs)}] {config.run_id}: {words}", flush=True)
