"""From a configuration to a recorded history: `run` takes a federation through all its rounds."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from ..config import Config
from ..core.errors import ClientFailure, Diverged, OutOfTime, is_divergence
from ..core.flat import Layout, sha256_of
from ..core.sparsity import jaccard, kept_per_layer
from ..core.state import ServerState
from ..methods.registry import Method
from ..records.catalogue import data_root
from ..records.kept_model import model_file
from ..records.names import describe
from ..records.provenance import provenance
from ..records.store import COLUMNS, load_results, read_run, run_lock, save_run
from .checkpoint import Progress, load_checkpoint, save_checkpoint
from .evaluate import evaluate_state
from .round import Clients, RoundRecord, run_round
from .setup import prepare

CHECKPOINT_SECONDS = 30.0  # at most one checkpoint in this time, unless `checkpoint_every` says otherwise


def run(
    config: Config, *, results_dir: str | Path | None = None, checkpoint_every: int | None = None, progress: bool = True
) -> pd.DataFrame:
    """Run a configuration to its end and return its history: one row per evaluated round, columns `store.COLUMNS`.

    With `results_dir` the run is recorded there as `<run_id>.csv` and `.json`; a run that is there already is returned
    without computing anything, and one that was interrupted goes on from its checkpoint, to the same bits.

    Args:
        checkpoint_every: rounds between checkpoints; None = at most one every 30 s.
        progress: show a progress line with an estimate of the time left.

    Raises:
        ValueError: bad input or damaged files.
        Diverged: the global model's test loss is not finite; names the round and the last finite loss. With
            `results_dir` the rows so far are recorded, with round and reason, and the next call raises at once.
        ClientFailure: a client failed or diverged and the configuration says "abort", or every client did.
    """
    return execute(config, results_dir, checkpoint_every, progress)


def execute(
    config: Config,
    results_dir: str | Path | None,
    checkpoint_every: int | None,
    progress: bool | tqdm,
    deadline: float = math.inf,
    connect: Callable[[Clients, Method, Config], Clients] = lambda clients, *_: clients,
    suffix: str = "checkpoint",
    wait: bool = True,
) -> pd.DataFrame:
    """`run` until it ends or `time.monotonic()` passes `deadline`, which raises `OutOfTime` after a checkpoint.

    At least one round is done, so that repeated calls come to an end. `progress` may be the bar of a whole sweep.
    `connect` gives clients that are elsewhere than in this process; their checkpoints have another `suffix`. A run that
    another process is computing is waited for, unless `wait` is False: then `Held` is raised.
    """
    config = config.resolved()
    if results_dir is None:
        state, clients, method = prepare(config)
        with closing(clients.workers):
            last = _train(Progress(state), connect(clients, method, config), method, config, progress)
        return history_of(last, config)
    folder = Path(results_dir)
    path = folder / f"{config.run_id}.{suffix}"
    if (stored := _stored(folder, config)) is not None and not path.exists():
        return stored
    state, clients, method = prepare(config)  # bad input shows here, before anything is written
    with closing(clients.workers), run_lock(folder, config.run_id, wait):
        if _stored(folder, config) is None:  # else by another process, while this one waited, or was killed
            now = load_checkpoint(path, config, state.weights.device) if path.exists() else Progress(state)
            clients = connect(clients, method, config)
            try:
                _train(now, clients, method, config, progress, path, checkpoint_every, deadline)
            except (ClientFailure, Diverged) as error:
                if not is_divergence(error):
                    raise
                failed = now.state.round - (not isinstance(error, ClientFailure))  # in a client, or when evaluated
                left = {"diverged": {"round": failed, "reason": str(error)}}
                _save(folder, config, now, clients, left)
                raise
            _save(folder, config, now, clients, left_by(method.layout, now.state))
        path.unlink(missing_ok=True)
        return _stored(folder, config)


def _stored(folder: Path, config: Config) -> pd.DataFrame | None:
    """The history of a run that is recorded in `folder`, or None. Raises Diverged if it is recorded as diverged."""
    stored = read_run(folder, config.run_id)
    if stored is None:
        return None
    history, record = stored
    if broken := record.get("diverged"):
        path = folder / f"{config.run_id}.json"
        remedy = f"delete {path} to go on from its last checkpoint, if there is one, or run again"
        raise Diverged(f"{config.run_id} diverged when it was recorded: {broken['reason']}; {remedy}")
    return history


def _save(folder: Path, config: Config, now: Progress, clients: Clients, left: dict) -> None:
    facts = provenance(now.state.weights.device, clients.workers.slots, **facts_of(clients, config, now))
    save_run(folder, config, history_of(now, config), facts, now.skipped, **left)


def _train(
    progress: Progress,
    clients: Clients,
    method: Method,
    config: Config,
    show: bool | tqdm,
    path: Path | None = None,
    checkpoint_every: int | None = None,
    deadline: float = math.inf,
) -> Progress:
    """All remaining rounds, checkpointed at `path` if given."""
    saved = row_start = time.monotonic()
    with _bar_of(show, progress, config) as bar, running(config), _naming_last_loss(progress):
        while progress.state.round < config.rounds:
            record = advance(progress, clients, method, config)
            state = progress.state
            if state.round % config.eval_every == 0 or state.round == config.rounds:
                metrics = evaluate_state(state, clients)
                now = time.monotonic()
                progress.rows.append(_row(record, metrics, progress, now - row_start))
                progress.wall_seconds += now - row_start
                progress.up_bytes = progress.down_bytes = progress.regrown = 0
                progress.row_mask = state.mask
                row_start = now
                bar.set_postfix_str(f"accuracy {metrics['accuracy']:.4f}", refresh=False)
            bar.update()
            now = time.monotonic()
            due = state.round % checkpoint_every == 0 if checkpoint_every else now - saved > CHECKPOINT_SECONDS
            if path is not None and (due or now > deadline) and state.round < config.rounds:
                save_checkpoint(path, progress, config)
                saved = time.monotonic()
                row_start += saved - now  # a checkpoint's time is not the round's
                if now > deadline:
                    raise OutOfTime(f"{config.run_id}: out of time after {state.round} of {config.rounds} rounds")
    return progress


@contextmanager
def _naming_last_loss(progress: Progress) -> Iterator[None]:
    """Say of a run that diverges what its last finite training loss was, and in which round."""
    try:
        yield
    except (ClientFailure, Diverged) as error:
        if progress.train_loss is None or not is_divergence(error):
            raise
        last = f"round {progress.state.round - 1} ended with the finite training loss {progress.train_loss:.4g}"
        raise type(error)(f"{error}; {last}") from error


def progress_bar(total: int, title: str, *, initial: int = 0, show: bool = True) -> tqdm:
    """One line on stderr: rounds done of `total`, rounds per second, time left."""
    return tqdm(
        initial=initial, total=total, desc=title, unit="round", disable=not show, mininterval=2, ascii=True,
        file=sys.stderr,
    )  # fmt: skip


def _bar_of(show: bool | tqdm, progress: Progress, config: Config):
    """A bar for this run alone, or the given one, moved on by the rounds that a checkpoint already holds."""
    done = progress.state.round
    if isinstance(show, bool):
        return progress_bar(config.rounds, config.run_id, initial=done, show=show)
    if not show.disable:
        show.initial, show.n = show.initial + done, show.n + done
    return nullcontext(show)


def advance(progress: Progress, clients: Clients, method: Method, config: Config) -> RoundRecord:
    """One round: `progress` takes the new state, the clients' memories, the bytes, the weights that returned, the loss,
    and who was skipped."""
    remembering = replace(clients, memories=progress.memories)
    progress.state, record = run_round(progress.state, remembering, method, config)
    progress.memories = {**progress.memories, **record.memories}
    progress.up_bytes += record.up_bytes
    progress.down_bytes += record.down_bytes
    progress.regrown += record.regrown
    progress.train_loss = record.train_loss
    for client, reason in record.skipped.items():
        progress.skipped.append({"round": record.round, "client": client, "reason": reason})
    return record


def _row(record: RoundRecord, metrics: dict, progress: Progress, seconds: float) -> dict:
    """A line of the history: bytes and regrown weights are summed over the rounds since the line before, the overlap is
    that with its mask, all else is the last round's."""
    known = {name: getattr(record, name) for name in COLUMNS if hasattr(record, name)}
    since = {name: getattr(progress, name) for name in ("up_bytes", "down_bytes", "regrown")}
    overlap = jaccard(progress.row_mask, progress.state.mask)
    return {**known, **metrics, **since, "mask_overlap": overlap, "seconds": seconds}


def history_of(progress: Progress, config: Config) -> pd.DataFrame:
    """The rows so far, in the columns of a results file; `local_accuracy` is NaN where clients are alike (IID)."""
    columns = list(COLUMNS)
    if config.dataset == "cifar100":
        columns.insert(2, "top5_accuracy")
    history = pd.DataFrame(progress.rows, columns=columns)
    return history.assign(local_accuracy=float("nan")) if config.partition == "iid" else history


def facts_of(clients: Clients, config: Config, progress: Progress) -> dict:
    """What a run's provenance says beyond versions and hardware."""
    data, state = clients.data, progress.state
    return {
        "precision": config.precision,
        "data": {"source": data.source, "variant": data.variant, "sha256": data.sha256},
        **clients.facts(),
        "state_sha256": {
            **{name: sha256_of({name: getattr(state, name)}) for name in ("weights", "buffers", "mask")},
            "memory": sha256_of(state.memory),
            "clients": {client: clients.digest(memory) for client, memory in sorted(progress.memories.items())},
        },
        "wall_seconds": progress.wall_seconds,
    }


def left_by(layout: Layout, state: ServerState) -> dict:
    """What a run leaves of its final state, as `save_run` takes it: layer by layer, the mask, the model's file."""
    file = model_file(layout, state.weights, state.mask, state.buffers)
    return {"layers": layers_of(layout, state), "mask": state.mask, "model": file}


def layers_of(layout: Layout, state: ServerState) -> list[dict]:
    """{name, shape, kept} of each prunable tensor: how many of its weights are not zero in the sparse model w*m."""
    kept = kept_per_layer(layout, state.weights[: layout.prunable] * state.mask != 0)
    slots = zip(layout.prunable_slots, kept, strict=True)
    return [{"name": slot.name, "shape": list(slot.shape), "kept": count} for slot, count in slots]


@contextmanager
def running(config: Config) -> Iterator[None]:
    """What rounds run under: one intra-op thread here too, deterministic convolutions, TF32 only if asked for.

    All is as it was on leaving.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = torch.get_num_threads(), matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic
    torch.set_num_threads(1)
    matmul.allow_tf32 = cudnn.allow_tf32 = config.precision == "tf32"
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
        last = run(config, results_dir=folder, progress=config.rounds > _LONG).iloc[-1]
        left = (time.monotonic() - start) / number * (len(configs) - number)
        more = f"; about {left:.0f} s left" if left >= 1 else ""
        print(f"[{number}/{len(configs)}] {config.run_id}: accuracy {last['accuracy']:.4f}{more}", flush=True)
    results = load_results(folder)
    return describe(results[results["run_id"].isin([config.run_id for config in configs])])
