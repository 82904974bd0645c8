"""Those who look at a run: what every observer is told, and the progress line.

Observers write down, show, save; none changes anything. The checkpoint is one of them (`checkpoint.py`), the studies of
the bound and of merging are others (`studies/trajectory.py`).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from torch import Tensor
from tqdm import tqdm

from ..config import Config
from ..core.sparsity import jaccard
from ..core.state import ServerState
from ..data.datasets import Dataset
from ..methods.base import Method
from ..records.store import COLUMNS
from .evaluate import evaluate_state
from .round import Clients, RoundRecord


@dataclass
class Progress:
    """How far a run is: all of it that a checkpoint holds.

    Attributes:
        rows: of the history so far; `row_mask` is the mask of the last one, before the first row the one that the run
            began with.
        pruned: (P,) bool, the weights that some mask so far has pruned.
        up_bytes, down_bytes, regrown: what is not yet in a row.
        skipped: clients that failed, {round, client, reason} each.
        train_loss: of the last round.
        observed: what observers keep, by their `name`; plain numbers and words.
    """

    state: ServerState
    rows: list[dict] = field(default_factory=list)
    row_mask: Tensor | None = None
    pruned: Tensor | None = None
    up_bytes: int = 0
    down_bytes: int = 0
    regrown: int = 0
    skipped: list[dict] = field(default_factory=list)
    wall_seconds: float = 0.0
    train_loss: float | None = None
    observed: dict[str, list[dict]] = field(default_factory=dict)

    def __post_init__(self):
        if self.row_mask is None:
            self.row_mask, self.pruned = self.state.mask, ~self.state.mask

    def take(self, state: ServerState, record: RoundRecord) -> None:
        """Note what a round did: its state, bytes, returned weights and loss, and who was skipped."""
        self.state, self.train_loss = state, record.train_loss
        self.pruned = self.pruned | ~state.mask
        self.up_bytes += record.up_bytes
        self.down_bytes += record.down_bytes
        self.regrown += record.regrown
        for client, reason in record.skipped.items():
            self.skipped.append({"round": record.round, "client": client, "reason": reason})

    def add_row(self, record: RoundRecord, metrics: dict, seconds: float) -> None:
        """Add a line to the history: bytes and regrown weights are summed over the rounds since the line before, the
        overlap is that with its mask, `returned` are the weights that are kept now and once were pruned, all else is
        the last round's."""
        known = {name: getattr(record, name) for name in COLUMNS if hasattr(record, name)}
        since = {name: getattr(self, name) for name in ("up_bytes", "down_bytes", "regrown")}
        masks = {"mask_overlap": jaccard(self.row_mask, self.state.mask)}
        masks["returned"] = int((self.state.mask & self.pruned).count_nonzero())
        self.rows.append({**known, **metrics, **since, **masks, "seconds": seconds})
        self.wall_seconds += seconds
        self.up_bytes = self.down_bytes = self.regrown = 0
        self.row_mask = self.state.mask


@dataclass
class Run:
    """A run, as its observers see it."""

    config: Config
    clients: Clients
    method: Method
    progress: Progress

    @property
    def state(self) -> ServerState:
        """The present state."""
        return self.progress.state

    def is_due(self) -> bool:
        """Whether the present state is one that is evaluated: every `eval_every`-th, and the last."""
        return self.state.round % self.config.eval_every == 0 or self.state.round == self.config.rounds

    def metrics(self) -> dict[str, float]:
        """`evaluate_state` of the present state: read from the history where that has it."""
        rows = self.progress.rows
        if rows and rows[-1]["round"] == self.state.round - 1:
            return rows[-1]
        return evaluate_state(self.state, self.clients)

    def history(self, since: int = 0) -> pd.DataFrame:
        """The rows so far, or those `since` a number of them, in the columns of a results file; `local_accuracy` is NaN
        where clients are alike (IID)."""
        columns = list(COLUMNS)
        if self.config.dataset == "cifar100":
            columns.insert(2, "top5_accuracy")
        history = pd.DataFrame(self.progress.rows[since:], columns=columns)
        return history.assign(local_accuracy=float("nan")) if self.config.partition == "iid" else history


class Observer:
    """The default of all that an observer is told: nothing is done.

    `name` is under which it keeps rows in `run.progress.observed`; what is there outlives an interruption.
    """

    name = ""

    def started(self, run: Run) -> None:
        """Before the first round, and again when an interrupted run goes on."""

    def round_done(self, run: Run, record: RoundRecord) -> None:
        """After every round, with its row in the history if it was evaluated."""

    def ended(self, run: Run, error: BaseException | None) -> None:
        """However the run ended: after its last round, or by this error."""


class LastState(Observer):
    """Keeps what a run leaves: its last `state`, and its `data`; None before there is one."""

    state: ServerState | None = None
    data: Dataset | None = None

    def ended(self, run: Run, error: BaseException | None) -> None:
        self.state, self.data = run.state, run.clients.data


class PartialRows(Observer):
    """The rows so far in a file, as they come, to be looked at while a run goes on; gone once the run is recorded."""

    def __init__(self, path: Path):
        self.path, self.count = path, 0

    def started(self, run: Run) -> None:
        if run.progress.rows:  # of an interrupted run, as its checkpoint has them
            self.path.write_text(run.history().to_csv(index=False, lineterminator="\n"))
        self.count = len(run.progress.rows)

    def round_done(self, run: Run, record: RoundRecord) -> None:
        if len(run.progress.rows) > self.count:
            rows = run.history(since=self.count)
            text = rows.to_csv(index=False, header=not self.count, lineterminator="\n")
            with open(self.path, "a" if self.count else "w") as file:
                file.write(text)
            self.count += len(rows)


class ProgressLine(Observer):
    """One line on stderr: rounds done, rounds per second, time left, the last accuracy.

    Args:
        bar: that of a whole sweep, which is moved on; None = one for this run alone.
        show: whether anything is to be seen.
    """

    def __init__(self, bar: tqdm | None = None, show: bool = True):
        self.bar, self.show, self.own = bar, show, bar is None

    def started(self, run: Run) -> None:
        done = run.state.round
        if self.own:
            self.bar = progress_bar(run.config.rounds, run.config.run_id, initial=done, show=self.show)
        elif not self.bar.disable:  # what a checkpoint already holds took no time
            self.bar.initial, self.bar.n = self.bar.initial + done, self.bar.n + done

    def round_done(self, run: Run, record: RoundRecord) -> None:
        if run.is_due():
            self.bar.set_postfix_str(f"accuracy {run.metrics()['accuracy']:.4f}", refresh=False)
        self.bar.update()

    def ended(self, run: Run, error: BaseException | None) -> None:
        if self.own:
            self.bar.close()


def progress_bar(total: int, title: str, *, initial: int = 0, show: bool = True) -> tqdm:
    """One line on stderr: rounds done of `total`, rounds per second, time left."""
    return tqdm(
        initial=initial,
        total=total,
        desc=title,
        unit="round",
        disable=not show,
        mininterval=2,
        ascii=True,
        file=sys.stderr,
    )
