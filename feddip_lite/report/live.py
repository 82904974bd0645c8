"""A run looked at while it goes on, in TensorBoard or as a curve in a notebook: observers of `run(observers=[...])`"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from ..train.observe import Observer, Run
from ..train.round import RoundRecord
from . import style
from .style import AXES, BLUE

SHOWN = ("accuracy", "top5_accuracy", "local_accuracy", "loss", "train_loss", "sparsity", "penalty", "lr")
CHURN = ("mask_overlap", "regrown", "returned", "pruning_error")


class TensorBoard(Observer):
    """Writes the history to `<folder>/<run_id>/` for TensorBoard: accuracy, loss, sparsity and settings of the round,
    MiB sent so far both ways, and how the mask moves. A run that goes on after an interruption goes on there, too.

    Raises:
        ValueError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(f"tensorboard is not installed ({error}); install feddip-lite[tensorboard]") from error
        self.folder, self.make = Path(folder).expanduser(), SummaryWriter

    def started(self, run: Run) -> None:
        self.writer = self.make(self.folder / run.config.run_id, purge_step=run.state.round)
        self.count = len(run.progress.rows)
        self.mib = sum(row["up_bytes"] + row["down_bytes"] for row in run.progress.rows) / 2**20

    def round_done(self, run: Run, record: RoundRecord) -> None:
        for row in run.progress.rows[self.count :]:
            self.mib += (row["up_bytes"] + row["down_bytes"]) / 2**20
            shown = {name: row[name] for name in SHOWN if name in row}
            shown |= {"mib": self.mib} | {f"mask/{name}": row[name] for name in CHURN}
            for name, value in shown.items():
                self.writer.add_scalar(name, value, row["round"])
        self.count = len(run.progress.rows)

    def ended(self, run: Run, error: BaseException | None) -> None:
        self.writer.close()


class LiveCurve(Observer):
    """Draws columns of the history anew after every evaluated round, in the cell of a notebook that runs it."""

    def __init__(self, columns: Sequence[str] = ("accuracy", "sparsity")):
        self.columns = columns

    def started(self, run: Run) -> None:
        from IPython.display import display

        with style.style():
            self.figure, axes = style.grid(1, len(self.columns), 2.6)
        for panel, column in zip(axes[0], self.columns, strict=True):
            panel.set(xlabel=AXES["round"], ylabel=AXES.get(column, column), xlim=(0, run.config.rounds))
        self.lines = [panel.plot([], [], color=BLUE)[0] for panel in axes[0]]
        self.handle = display(self.figure, display_id=True)

    def round_done(self, run: Run, record: RoundRecord) -> None:
        if not run.is_due():
            return
        history = run.history()
        for line, column in zip(self.lines, self.columns, strict=True):
            line.set_data(history["round"], history[column])
            line.axes.relim()
            line.axes.autoscale_view(scalex=False)
        if self.handle is not None:  # None outside of notebooks
            self.handle.update(self.figure)

    def ended(self, run: Run, error: BaseException | None) -> None:
        plt.close(self.figure)  # else the cell would show it twice
