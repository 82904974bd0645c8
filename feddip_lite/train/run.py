"""From a configuration to a recorded history: `run` takes a federation through all its rounds.

Read before: `round.py` (one of them); after: `observe.py` (who looks on), `recording.py` (what is left).
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from ..config import Config
from ..core.errors import ClientFailure, Diverged, Note, is_divergence
from ..data.datasets import load_dataset
from ..data.own import known_as
from ..methods.base import Method
from ..methods.registry import settings_of
from ..records.catalogue import data_root
from ..records.names import describe
from ..records.store import load_results, run_lock
from .checkpoint import Checkpoints, load_checkpoint
from .evaluate import evaluate_state
from .identity import known_model
from .observe import Observer, PartialRows, Progress, ProgressLine, Run
from .recording import Recording
from .round import Clients, run_round
from .setup import prepare


def run(
    config: Config,
    *,
    results_dir: str | Path | None = None,
    checkpoint_every: int | None = None,
    progress: bool = True,
    observers: Sequence[Observer] = (),
    model: object = None,
    data: object = None,
) -> pd.DataFrame:
    """Run a configuration to its end and return its history: one row per evaluated round, columns `store.COLUMNS`; its
    `attrs` hold the `run_id`.

    With `results_dir` the run is recorded there as `<run_id>.csv` and `.json`, with its rows so far in
    `<run_id>.partial.csv` until then; a run that is there already is returned
    without computing anything, and one that was interrupted goes on from its checkpoint, to the same bits.

    Args:
        checkpoint_every: rounds between checkpoints; None = at most one every 30 s.
        progress: show a progress line with an estimate of the time left.
        observers: are told when the run starts, after every round, and when it ends (`train.observe.Observer`).
        model: one of your own in place of the configuration's: an `nn.Module`, or what makes one (`register_model`).
        data: your own in place of the configuration's data set: arrays, a folder of images, or torch data sets
            (`own_dataset`). Both are called `own-` and the first digits of their fingerprints, which so enter the id.

    Raises:
        ValueError: bad input or damaged files; or the run is recorded already, from other data or another model of its
            name.
        Diverged: the global model's test loss is not finite; names the round and the last finite loss. With
            `results_dir` the rows so far are recorded, with round and reason, and the next call raises at once.
        ClientFailure: a client failed or diverged and the configuration says "abort", or every client did.
    """
    config = with_own(config, model, data)
    recording = None if results_dir is None else Recording(Path(results_dir).expanduser())
    line = ProgressLine(show=progress)
    history = execute(config, recording, [line, *observers], checkpoint_every=checkpoint_every)
    say_if_short(config.resolved(), history)
    history.attrs["run_id"] = config.run_id
    return history


def say_if_short(config: Config, history: pd.DataFrame) -> None:
    """Note that a run ended below its target sparsity, and why."""
    left, aimed = history["sparsity"].iloc[-1], config.target_sparsity
    if "target_sparsity" in settings_of(config.method, config.preset) and left < aimed - 0.002:
        why = "schedules reach it only as rounds go on"
        if config.mask_interval:
            why += f", and masks change every {config.mask_interval} rounds"
        words = f"target_sparsity: {aimed:g}, and the run ended at {left:.3f}: {why}; final_prune gives it exactly"
        warnings.warn(words, Note, stacklevel=3)


def with_own(config: Config, model: object = None, data: object = None) -> Config:
    """The configuration with a model or data of one's own, which are made known in this process under names that say
    what they are. Raises ValueError for what cannot be used."""
    if data is not None:
        config = replace(config, dataset=known_as(data))
    if model is not None:
        config = replace(config, model=known_model(model, config, load_dataset(config.dataset)))
    return config


def execute(
    config: Config,
    recording: Recording | None,
    observers: Sequence[Observer] = (),
    *,
    checkpoint_every: int | None = None,
    deadline: float = math.inf,
    connect: Callable[[Clients, Method, Config], Clients] = lambda clients, method, config: clients,
    suffix: str = "checkpoint",
    wait: bool = True,
) -> pd.DataFrame:
    """`run` until it ends or `time.monotonic()` passes `deadline`, which raises `OutOfTime` after a checkpoint.

    At least one round is done, so that repeated calls come to an end. `connect` gives clients that are elsewhere than
    in this process; their checkpoints have another `suffix`. A run that another process is computing is waited for,
    unless `wait` is False: then `Held` is raised.
    """
    config = config.resolved()
    if recording is None:
        state, clients, method = prepare(config)
        with closing(clients.workers):
            now = Run(config, connect(clients, method, config), method, Progress(state))
            go_through(now, observers)
        return now.history()
    path, partial = (recording.folder / f"{config.run_id}.{kind}" for kind in (suffix, "partial.csv"))
    if (stored := recording.stored(config)) is not None and not path.exists():
        recording.refuse_other(config)
        return stored
    state, clients, method = prepare(config)  # bad input shows here, before anything is written
    with closing(clients.workers), run_lock(recording.folder, config.run_id, wait):
        if recording.stored(config) is None:  # else by another process, while this one waited, or was killed
            done = load_checkpoint(path, config, state.weights.device, clients) if path.exists() else Progress(state)
            now = Run(config, connect(clients, method, config), method, done)
            try:
                watching = [PartialRows(partial), Checkpoints(path, checkpoint_every, deadline)]
                go_through(now, [*observers, *watching])
            except (ClientFailure, Diverged) as error:
                if not is_divergence(error):
                    raise
                failed = now.state.round - (not isinstance(error, ClientFailure))  # in a client, or when evaluated
                recording.save(now, {"round": failed, "reason": str(error)})
                partial.unlink(missing_ok=True)
                raise
            recording.save(now)
        partial.unlink(missing_ok=True)  # before the checkpoint, which a killed process that is called again finds
        path.unlink(missing_ok=True)
        return recording.stored(config)


def go_through(run: Run, observers: Sequence[Observer]) -> None:
    """All remaining rounds of a run: THE loop."""
    config, progress = run.config, run.progress
    with running(config), told(run, observers), naming_last_loss(progress):
        row_start = time.monotonic()
        while progress.state.round < config.rounds:
            state, record = run_round(progress.state, run.clients, run.method, config)
            progress.take(state, record)
            if run.is_due():
                metrics = evaluate_state(state, run.clients)
                now = time.monotonic()
                progress.add_row(record, metrics, now - row_start)
                row_start = now
            before = time.monotonic()
            for observer in observers:
                observer.round_done(run, record)
            row_start += time.monotonic() - before  # what observers do is not the round's time
            del state, record  # else this round's models would lie beside the next one's


@contextmanager
def told(run: Run, observers: Sequence[Observer]) -> Iterator[None]:
    """Tell observers that the run starts, and how it ends."""
    for observer in observers:
        observer.started(run)
    error = None
    try:
        yield
    except BaseException as caught:
        error = caught
        raise
    finally:
        for observer in observers:
            observer.ended(run, error)


@contextmanager
def naming_last_loss(progress: Progress) -> Iterator[None]:
    """Say of a run that diverges what its last finite training loss was, and in which round."""
    try:
        yield
    except (ClientFailure, Diverged) as error:
        if progress.train_loss is None or not is_divergence(error):
            raise
        last = f"round {progress.state.round - 1} ended with the finite training loss {progress.train_loss:.4g}"
        raise type(error)(f"{error}; {last}") from error


@contextmanager
def running(config: Config) -> Iterator[None]:
    """What rounds run under: one intra-op thread here too, deterministic convolutions, TF32 only if asked for (and
    under bf16, which is less, where that does not reach: in evaluation).

    All is as it was on leaving.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = torch.get_num_threads(), matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic
    torch.set_num_threads(1)
    matmul.allow_tf32 = cudnn.allow_tf32 = config.precision in ("tf32", "bf16")
    cudnn.deterministic = True
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic = before[1:]


_LONG = 100  # rounds from which on a run shows its own progress


def train(configs: Iterable[Config], folder: Path) -> pd.DataFrame:
    """Run what `folder` does not hold yet, a printed line for each run; returns these runs as `describe` does."""
    os.environ["FEDDIP_DATA"] = str(data_root())
    configs, start = list(configs), time.monotonic()
    for number, config in enumerate(configs, 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Note)  # a queue is meant as it stands
            last = run(config, results_dir=folder, progress=config.rounds > _LONG).iloc[-1]
        left = (time.monotonic() - start) / number * (len(configs) - number)
        more = f"; about {left:.0f} s left" if left >= 1 else ""
        print(f"[{number}/{len(configs)}] {config.run_id}: accuracy {last['accuracy']:.4f}{more}", flush=True)
    results = load_results(folder)
    return describe(results[results["run_id"].isin([config.run_id for config in configs])])
