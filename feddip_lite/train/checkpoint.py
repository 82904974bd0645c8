"""One file holds all that a run needs to go on: header, SHA-256, tensors. Random states are not among it, since every
draw is addressed by (seed, purpose, round, client)."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..config import UNHASHED, Config
from ..core.state import Memory, ServerState
from ..records.store import atomic_write

MAGIC = b"feddip_lite checkpoint 2\n"


@dataclass
class Progress:
    """A run in progress: server state, client memories, rows so far, what is not yet in a row (bytes, regrown weights),
    skipped clients, and the training loss of the last round. `row_mask` is the mask of the last row, before the first
    row the one that the run began with."""

    state: ServerState
    memories: Mapping[int, Memory] = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)
    row_mask: Tensor | None = None
    up_bytes: int = 0
    down_bytes: int = 0
    regrown: int = 0
    skipped: list[dict] = field(default_factory=list)
    wall_seconds: float = 0.0
    train_loss: float | None = None

    def __post_init__(self):
        if self.row_mask is None:
            self.row_mask = self.state.mask


def save_checkpoint(path: Path, progress: Progress, config: Config) -> None:
    """Replace the checkpoint at `path` in one step. Raises OSError, and leaves the old one, if that cannot be done."""
    state = progress.state
    content = {
        "config": _identity(config),
        "state": {name: getattr(state, name) for name in ("round", "weights", "buffers", "mask")},
        "memory": dict(state.memory),
        "memories": {client: dict(memory) for client, memory in progress.memories.items()},
        "row_mask": progress.row_mask,
        "rest": json.dumps({name: getattr(progress, name) for name in _REST}),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    payload = buffer.getvalue()
    atomic_write(path, MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)


def load_checkpoint(path: Path, config: Config, device: torch.device) -> Progress:
    """The progress saved at `path`, tensors on `device`.

    Raises:
        ValueError: damaged, of another version or of another configuration; names the file and the reason.
    """
    data = path.read_bytes()
    start = len(MAGIC) + 65
    if not data.startswith(MAGIC):
        raise ValueError(f"{path}: not a checkpoint of this version; delete it to start the run again")
    if data[len(MAGIC) : start] != hashlib.sha256(data[start:]).hexdigest().encode() + b"\n":
        raise ValueError(f"{path}: damaged checkpoint (SHA-256 does not match); delete it to start the run again")
    try:
        content = torch.load(io.BytesIO(data[start:]), map_location=device, weights_only=True)  # unpickles no objects
        there, here = json.loads(content["config"]), json.loads(_identity(config))
        state = ServerState(**content["state"], memory=content["memory"])
        rest = json.loads(content["rest"])
        progress = Progress(state, content["memories"], row_mask=content["row_mask"], **rest)
    except Exception as error:  # whole, but not ours; torch and pickle raise many types
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise ValueError(f"{path}: not a checkpoint ({reason}); delete it to start the run again") from error
    for name in sorted({*there, *here}):
        if there.get(name) != here.get(name):
            what = f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
            raise ValueError(f"{path}: checkpoint of another configuration ({what}); delete it to start the run again")
    return progress


def _identity(config: Config) -> str:
    values = {key: value for key, value in asdict(config.resolved()).items() if key not in UNHASHED}
    return json.dumps(values, sort_keys=True)


_REST = ("rows", "up_bytes", "down_bytes", "regrown", "skipped", "wall_seconds", "train_loss")
