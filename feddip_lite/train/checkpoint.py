"""One file holds all that a run needs to go on: header, SHA-256, tensors. Random states are not among it, since every
draw is addressed by (seed, purpose, round, client)."""

from __future__ import annotations

import hashlib
import io
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from ..config import UNHASHED, Config
from ..core.errors import OutOfTime
from ..core.state import EMPTY, ServerState
from ..records.store import atomic_write, config_of
from .identity import fingerprints, refuse_differing
from .observe import Observer, Progress, Run
from .round import Clients, RoundRecord

MAGIC = b"feddip_lite checkpoint 3\n"
CHECKPOINT_SECONDS = 30.0  # at most one checkpoint in this time, unless `checkpoint_every` says otherwise
_REST = ("rows", "up_bytes", "down_bytes", "regrown", "skipped", "wall_seconds", "train_loss", "observed")


class Checkpoints(Observer):
    """Saves the run from time to time, and stops it when its time is up.

    Args:
        path: the file. every: rounds between two; None = at most one every CHECKPOINT_SECONDS.
        deadline: on the clock of `time.monotonic`. At least one round is done, so that repeated calls come to an end.
    """

    def __init__(self, path: Path, every: int | None, deadline: float = math.inf):
        self.path, self.every, self.deadline = path, every, deadline
        self.saved, self.saved_round = time.monotonic(), 0

    def started(self, run: Run) -> None:
        self.saved_round = run.state.round  # what the file holds, or nothing

    def ended(self, run: Run, error: BaseException | None) -> None:
        """Tell the user of an interrupted run what is left of it."""
        if isinstance(error, KeyboardInterrupt):
            there = f"goes on from the checkpoint after {self.saved_round} of {run.config.rounds} rounds"
            error.add_note(f"the same command {there if self.saved_round else 'begins again: no checkpoint yet'}")

    def round_done(self, run: Run, record: RoundRecord) -> None:
        """Raises OutOfTime, after a checkpoint, past the deadline."""
        now, done, rounds = time.monotonic(), run.state.round, run.config.rounds
        due = done % self.every == 0 if self.every else now - self.saved > CHECKPOINT_SECONDS
        if done == rounds or not (due or now > self.deadline):
            return
        save_checkpoint(self.path, run.progress, run.config, origin_of(run.config, run.clients))
        self.saved, self.saved_round = time.monotonic(), done
        if now > self.deadline:
            raise OutOfTime(f"{run.config.run_id}: out of time after {done} of {rounds} rounds")


def save_checkpoint(path: Path, progress: Progress, config: Config, origin: Mapping[str, str] = EMPTY) -> None:
    """Replace the checkpoint at `path` in one step; `origin` are fingerprints of what the run came from (`origin_of`).
    Raises OSError, and leaves the old one, if that cannot be done."""
    state = progress.state
    content = {
        "config": json.dumps(_settings(asdict(config.resolved())), sort_keys=True),
        "came_from": dict(origin),
        "state": {name: getattr(state, name) for name in ("round", "weights", "buffers", "mask")},
        "memory": dict(state.memory),
        "memories": {client: dict(memory) for client, memory in state.memories.items()},
        "estimates": dict(state.estimates),
        "held": dict(state.held),
        "masks": {"row_mask": progress.row_mask, "pruned": progress.pruned},
        "rest": json.dumps({name: getattr(progress, name) for name in _REST}),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    payload = buffer.getvalue()
    atomic_write(path, MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)


def origin_of(config: Config, clients: Clients) -> dict[str, str]:
    """Fingerprints of the run's data and split, and of its model and method where these are one's own."""
    return {"split": clients.split_sha256, **fingerprints(config, clients.data)}


def load_checkpoint(path: Path, config: Config, device: torch.device, clients: Clients | None = None) -> Progress:
    """The progress saved at `path`, tensors on `device`; with `clients`, of a run on their data.

    Raises:
        ValueError: damaged, of another version or of another configuration, or it came from other data or from another
            model or method of the same name; names the file and the reason.
    """
    data = path.read_bytes()
    start = len(MAGIC) + 65
    if not data.startswith(MAGIC):
        raise ValueError(f"{path}: not a checkpoint of this version; delete it to start the run again")
    if data[len(MAGIC) : start] != hashlib.sha256(data[start:]).hexdigest().encode() + b"\n":
        raise ValueError(f"{path}: damaged checkpoint (SHA-256 does not match); delete it to start the run again")
    try:
        content = torch.load(io.BytesIO(data[start:]), map_location=device, weights_only=True)  # unpickles no objects
        origin = content["came_from"]
        there = _settings(config_of({"config": json.loads(content["config"])}))  # younger settings had their default
        here = _settings(asdict(config.resolved()))
        memories = {name: content[name] for name in ("memory", "memories")}
        younger = {name: content.get(name, {}) for name in ("estimates", "held")}  # older checkpoints have none
        state = ServerState(**content["state"], **memories, **younger)
        progress = Progress(state, **content["masks"], **json.loads(content["rest"]))
    except Exception as error:  # whole, but not ours; torch and pickle raise many types
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise ValueError(f"{path}: not a checkpoint ({reason}); delete it to start the run again") from error
    for name in sorted({*there, *here}):
        if there.get(name) != here.get(name):
            what = f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
            raise ValueError(f"{path}: checkpoint of another configuration ({what}); delete it to start the run again")
    if clients is not None:
        refuse_differing(path, "a run", origin, origin_of(config, clients), "delete it to start the run again")
    return progress


def _settings(values: Mapping) -> dict:
    """What two runs must share to be the same: of all settings those that change a result, as JSON has them."""
    return json.loads(json.dumps({key: value for key, value in values.items() if key not in UNHASHED}))
