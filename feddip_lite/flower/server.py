"""The federation on Flower, the server's side: the same `run_round`, whose offers go out as Flower messages.

`serve` is what a Flower server app calls; `Remote` are clients elsewhere. Nothing of Flower's strategies is used: they
sum replies in order of arrival, average failed clients away, wait without limit and cannot resume.
Read next: `link.py` (who is where, and how a message gets there), `client.py` (the client's side).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import flwr
from flwr.serverapp import Grid

from ..config import Config
from ..core.errors import guarded
from ..core.message import Message, encode
from ..core.state import Memory, ServerState
from ..methods.base import Method
from ..plugins import load_plugins
from ..records.store import atomic_write
from ..train.recording import Recording
from ..train.round import Clients
from ..train.run import execute
from .link import Link, token_of

CHECKPOINT = "flower.checkpoint"  # holds tokens in place of memories: of no use to a run in one process, nor its to us


@dataclass(frozen=True, kw_only=True)
class Remote(Clients):
    """Clients behind a `Link`. Their memories in the state are tokens: which one a client holds, not what is in it."""

    link: Link

    def deliver(
        self, method: Method, offers: Mapping[int, Message], state: ServerState, config: Config
    ) -> dict[int, Future]:
        sent = {client: encode(offer) for client, offer in offers.items()}
        return self.link.exchange(sent, state.memories, state.round)

    def ask(
        self, method: Method, questions: Mapping[int, Message], results: Mapping[int, object], t: int
    ) -> dict[int, Future]:
        return self.link.inquire({client: encode(question) for client, question in questions.items()}, t)

    def facts(self) -> dict:
        members = sorted(self.link.claims.values(), key=lambda member: member.client)
        clients = {str(m.client): {"samples": m.samples, "data": m.data} for m in members}
        return {**super().facts(), "flower": flwr.__version__, "clients": clients}

    def digest(self, memory: Memory) -> str:
        return token_of(memory).partition("-")[2]


def serve(grid: Grid, settings: Mapping) -> None:
    """Run the configuration in `settings` (app/pyproject.toml has the keys) over the nodes of `grid`.

    The exit status, as of `python -m feddip_lite run`, and what failed are written to `settings["outcome"]`, because
    Flower itself calls every end a success.

    Raises:
        SystemExit: the status is not 0.
    """

    def work() -> int:
        load_plugins()
        config = Config.from_dict(json.loads(settings["config"]))
        timeouts = settings["join-timeout"], settings["reply-timeout"]
        every = settings["checkpoint-every"]
        recording, connect = Recording(Path(settings["results"])), partial(connected, grid, timeouts)
        execute(config, recording, checkpoint_every=every, connect=connect, suffix=CHECKPOINT)
        return 0

    status, line = guarded(work)
    atomic_write(Path(settings["outcome"]), json.dumps({"status": status, "line": line}).encode())
    if status:
        raise SystemExit(status)


def connected(grid: Grid, timeouts: tuple[float, float], clients: Clients, method: Method, config: Config) -> Remote:
    """The same clients, elsewhere; returns when the whole federation is there.

    Raises:
        Unreachable: it is not, in time, or not the right one.
    """
    join, reply = timeouts
    link = Link(grid, config, method.layout, clients, join_timeout=join, reply_timeout=reply)
    link.join()
    return Remote(**{item.name: getattr(clients, item.name) for item in fields(clients)}, link=link)
