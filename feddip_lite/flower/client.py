"""The federation on Flower, a client's side: `query` says who this is, `train` does what `train_client` does.

A client holds only its own shard. Either every node has the configuration's data set and takes its share of it, or a
node has data of its own, by one function (`own_data`). Its memories lie in files here and never travel: the server
knows them by token, and asks for the one that its own state goes with. Read next: `train.round.train_client`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial, wraps
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from flwr.app import Context, RecordDict
from flwr.app import Message as Envelope

from .._version import __version__
from ..config import Config
from ..core.flat import Layout, sha256_of
from ..core.message import Message, decode, encode
from ..core.state import Memory
from ..data.datasets import Dataset, dataset_of, fields_of
from ..data.files import checksum
from ..data.own import read_images
from ..data.partition import Split
from ..plugins import load_plugins
from ..records.store import atomic_write
from ..train.failures import check_client, limit_of
from ..train.inquiry import own_of, tell_client
from ..train.round import train_client
from ..train.run import running
from ..train.setup import prepare
from .wire import TOKEN, pack, received, typed, unpack

OWN = "own"
"""The file beside a client's memories that holds what its last training left, where a round has further exchanges."""


def answering(work: Callable[[Envelope, Context], RecordDict]) -> Callable[[Envelope, Context], Envelope]:
    """`work`, whose content is sent back. What goes wrong in it is told to the server in words, never hidden."""

    @wraps(work)
    def answer(envelope: Envelope, context: Context) -> Envelope:
        try:
            content = work(envelope, context)
        except (Exception, SystemExit) as error:
            content = pack({"failure": f"{type(error).__name__}: {error}"})
        return Envelope(content, reply_to=envelope)

    return answer


@answering
def query(envelope: Envelope, context: Context) -> RecordDict:
    """Who this client is, for the server to check: its number, samples, and the SHA-256 of its data."""
    config, client, (_, clients, _) = _site_of(context)
    split = "" if any(_source_of(context)) else clients.split_sha256
    about = {"client": client, "of": config.clients, "run": config.run_id, "version": __version__}
    return pack({**about, "samples": len(clients.train[client]), "data": clients.data.sha256, "split": split})


@answering
def train(envelope: Envelope, context: Context) -> RecordDict:
    """One client's part of a round."""
    config, client, (state, clients, method) = _site_of(context)
    words, payload = unpack(envelope.content)
    t, token = typed(words, "round", int), typed(words, TOKEN, str)
    layout, device = method.layout, state.weights.device
    folder = folder_of(context, config, client)
    memory = recall(folder, token, layout) if token else {}
    memory = {name: tensor.to(device) for name, tensor in memory.items()}
    with running(config):
        offer = received(payload, layout, device)
        job = clients.workers.submit(train_client, method, offer, memory, clients, config, t, client)
        reply, memory, result = clients.workers.result(job, limit_of(config))
    check_client(reply, result, layout.prunable)
    if method.inquires(t):
        atomic_write(folder / OWN, encode(own_of(result).plus(round=torch.tensor([t]))))
    said = {"client": client, "run": config.run_id, "round": t, "loss": float(result.loss), "received": len(payload)}
    return pack({**said, TOKEN: keep(folder, t, memory, token) if memory else ""}, encode(reply))


@answering
def tell(envelope: Envelope, context: Context) -> RecordDict:
    """A client's answer to a question of a round in which it has trained (`train/inquiry.py`)."""
    config, client, (state, clients, method) = _site_of(context)
    words, payload = unpack(envelope.content)
    t, path = typed(words, "round", int), folder_of(context, config, client) / OWN
    layout, device = method.layout, state.weights.device
    own = received(path.read_bytes(), layout, device) if path.exists() else None
    if own is None or own.extras["round"].tolist() != [t]:
        raise ValueError(f"{path}: what training left in round {t} is not here")
    with running(config):
        job = clients.workers.submit(tell_client, method, received(payload, layout, device), own, t)
        answer, _, _ = clients.workers.result(job, limit_of(config))
    return pack({"client": client, "run": config.run_id, "round": t, "received": len(payload)}, encode(answer))


def _site_of(context: Context):
    """(configuration, this client's number, `prepare` for it)."""
    client, (data, folder) = typed(context.node_config, "partition-id", int), _source_of(context)
    text = typed(context.run_config, "config", str)
    config = _config_of(text)
    if not 0 <= client < config.clients:
        raise ValueError(f"partition-id: {client} is not valid; expected an integer in [0, {config.clients - 1}]")
    return config, client, _prepared(text, client if data or folder else None, data, folder)


def _config_of(text: str) -> Config:
    load_plugins()
    return replace(Config.from_dict(json.loads(text)).resolved(), workers=1)  # one client at a time


@lru_cache(maxsize=1)  # a process that serves many messages (simulation) prepares once
def _prepared(text: str, client: int | None, data: str, folder: str):
    if client is None:
        return prepare(_config_of(text))
    return prepare(_config_of(text), partial(own_data, client=client, data=data, folder=folder))


def _source_of(context: Context) -> tuple[str, str]:
    return str(context.node_config.get("data", "")), str(context.node_config.get("folder", ""))


def memories_of(context: Context) -> Path:
    """Where this node keeps memories: the node configuration's `memories`, else a folder in Flower's home."""
    home = Path(os.environ.get("FLWR_HOME", "~/.flwr")).expanduser()
    return Path(context.node_config.get("memories") or home / "memories")


def folder_of(context: Context, config: Config, client: int) -> Path:
    """Where this client keeps what it remembers of the run."""
    return memories_of(context) / config.run_id / str(client)


def own_data(config: Config, client: int, data: str, folder: str) -> tuple[Dataset, Split, np.ndarray]:
    """The data that a node brings itself: the node configuration's `folder`, read by its `data`, "module:function".

    The function is given the folder and returns (images uint8 (N, H, W) or (N, H, W, 3), labels (N,) integers, or names
    of the data set's classes). Without one, `data.own.read_images` reads the folder: `<folder>/<label>/*.png`. Images
    are scaled and normalised as the configuration's data set.

    Raises:
        ValueError: what it returns is not that; names what is wrong.
    """
    module, _, name = data.partition(":")
    load = getattr(import_module(module), name) if data else read_images
    images, labels = (np.asarray(part) for part in load(folder))
    known = fields_of(config.dataset)
    classes, names = known["classes"], known.get("class_names", ())
    if labels.dtype.kind == "U":
        labels = numbered(labels, names)
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (3,)) or not len(images):
        raise ValueError(f"images: {images.dtype} {images.shape}; expected uint8 (N, H, W) or (N, H, W, 3), N >= 1")
    if (
        labels.shape != images.shape[:1]
        or labels.dtype.kind not in "iu"
        or not 0 <= labels.min() <= labels.max() < classes
    ):
        raise ValueError(f"labels: {labels.dtype} {labels.shape}; expected ({len(images)},) integers in [0, {classes})")
    arrays = {"train_images": images, "train_labels": labels, "test_images": images[:0], "test_labels": labels[:0]}
    dataset = dataset_of(config.dataset, arrays, f"client {client}'s own", checksum(arrays), "own")
    nothing = np.empty(0, np.int64)
    shards = [nothing] * config.clients
    shards[client] = np.arange(len(labels))
    return dataset, Split(tuple(shards), (nothing,) * config.clients), nothing


def numbered(labels: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Labels (N,) that are words as int64: the numbers that they are, or the places of the classes called so.

    Raises:
        ValueError: neither; names the first.
    """
    places = {name: place for place, name in enumerate(names)}
    strange = [label for label in np.unique(labels) if label not in places and (places or not label.isdecimal())]
    if strange:
        expected = f"one of {', '.join(names)}" if places else "numbers of classes"
        raise ValueError(f"labels: {str(strange[0])!r} is not valid; expected {expected}")
    return np.array([places[label] if places else int(label) for label in labels])


def recall(folder: Path, token: str, layout: Layout) -> Memory:
    """The memory that `token` names, on the CPU.

    Raises:
        ValueError: it is not here, or damaged.
    """
    if not re.fullmatch(r"\d{1,9}-[0-9a-f]{64}", token):
        raise ValueError(f"token: {token!r} is not valid; expected <round>-<SHA-256>")
    round_, _, sha256 = token.partition("-")
    path = folder / f"{token}.memory"
    remedy = "bring it back, or delete the server's checkpoint to start the run again"
    if not path.exists():
        raise ValueError(f"{path}: the memory of round {round_} is not here; {remedy}")
    with suppress(ValueError):
        memory = decode(path.read_bytes(), layout).extras
        if sha256_of(memory) == sha256:
            return memory
    raise ValueError(f"{path}: damaged (SHA-256 does not match); {remedy}")


def keep(folder: Path, t: int, memory: Memory, asked: str) -> str:
    """Store what is remembered after round t. Returns its token.

    Of all others only the one that was `asked` for in this round stays: a server that resumes asks for one of the two.
    """
    token = f"{t}-{sha256_of(memory)}"
    atomic_write(folder / f"{token}.memory", encode(Message(extras=memory)))
    for path in folder.glob("*.memory"):
        if path.stem not in (token, asked):
            path.unlink()
    return token
