"""Who is where on Flower, and how a message gets there and back: handshake, time limits, refusals.

A node is trusted with nothing: what it says it is must fit the run before round 0, and every reply is decoded, and
checked against what was asked and what was said in the handshake. Read before: `server.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from flwr.app import Message as Envelope
from flwr.app import MessageType, RecordDict
from flwr.serverapp import Grid

from .._version import __version__
from ..config import Config
from ..core.errors import ClientFailure, Diverged
from ..core.flat import Layout
from ..core.message import Message
from ..core.state import EMPTY, Memory
from ..train.round import Clients
from .wire import TELL, TOKEN, pack, received, typed, unpack

POLL_SECONDS = 0.1
SPARE_SECONDS = 60.0  # for which Flower keeps a message that is waited for no more, so that it is we who say so
_MEMBER = {"client": int, "samples": int, "data": str, "split": str}


class Unreachable(ClientFailure):
    """The federation is not complete in time, or a node does not belong to it; names clients and reasons."""


class Refused(RuntimeError):
    """What a client says went wrong on its side, or the network's word that it is not there."""


@dataclass(frozen=True)
class Member:
    """Who a node says it is. `data`, `split`: SHA-256 of the data set and of who owns what of it; a client with data of
    its own knows no split."""

    client: int
    samples: int
    data: str
    split: str


@dataclass(frozen=True)
class Account:
    """What a reply is checked against in place of the `LocalResult`, which stays where it was made and checked."""

    samples: int
    loss: float

    def check(self) -> None:
        """The client has done it: a weight that is not finite has never left it."""


class Link:
    """Which node is which client, and how a message gets there and back.

    Args:
        clients: whose data and split the nodes must hold, unless they bring their own.
        join_timeout: seconds to wait for the whole federation before the first round.
        reply_timeout: seconds to wait for the replies of a round; a later one is never looked at.
    """

    def __init__(
        self, grid: Grid, config: Config, layout: Layout, clients: Clients, join_timeout: float, reply_timeout: float
    ):
        self.grid, self.layout, self.device = grid, layout, clients.data.train_images.device
        self.run_id, self.clients = config.run_id, config.clients
        self.expected = {"run": config.run_id, "of": config.clients, "version": __version__}
        self.data, self.split = clients.data.sha256, clients.split_sha256
        self.join_timeout, self.reply_timeout = join_timeout, reply_timeout
        self.claims: dict[int, Member] = {}  # by node, as all that follows
        self.refused: dict[int, str] = {}
        self.asked: dict[str, int] = {}  # questions under way: number -> node

    def join(self) -> None:
        """Wait until every client is there, once."""
        deadline = time.monotonic() + self.join_timeout
        while True:
            self.greet()
            absent = [client for client in range(self.clients) if not self.nodes_of(client)]
            twice = [client for client in range(self.clients) if len(self.nodes_of(client)) > 1]
            if self.refused or twice:
                reasons = [*self.refused.values(), *(f"client {client}: two nodes claim to be it" for client in twice)]
                raise Unreachable("; ".join(reasons))
            if not absent:
                return
            if time.monotonic() > deadline:
                names = ", ".join(map(str, absent[:10])) + (", ..." if len(absent) > 10 else "")
                raise Unreachable(
                    f"join-timeout: {len(absent)} of {self.clients} clients are not there after "
                    f"{self.join_timeout:g} s ({names}); start their supernodes, or give more time"
                )
            time.sleep(POLL_SECONDS)

    def greet(self) -> None:
        """Forget nodes that are gone, ask those that are new who they are, and hear who has answered; without waiting.

        A question that Flower itself answers with an error (the node has just died) is asked again while it is online.
        """
        online = set(self.grid.get_node_ids())
        self.claims = {node: member for node, member in self.claims.items() if node in online}
        self.refused = {node: reason for node, reason in self.refused.items() if node in online}
        self.asked = {number: node for number, node in self.asked.items() if node in online}
        new = online.difference(self.claims, self.refused, self.asked.values())
        self.asked |= self.send({node: pack({}) for node in sorted(new)}, MessageType.QUERY, self.join_timeout)
        for node, answer in self.answered(self.asked):
            if not answer.has_error():
                try:
                    self.claims[node] = self.welcome(_words_of(answer)[0])
                except (ValueError, Refused) as error:
                    self.refused[node] = str(error)

    def welcome(self, words: dict) -> Member:
        """The member that a node says it is, if that can be one of this federation."""
        member = Member(*(typed(words, name, kind) for name, kind in _MEMBER.items()))
        who = f"client {member.client}"
        for name, value in self.expected.items():
            if words.get(name) != value:
                raise ValueError(f"{who}: {name} is {words.get(name)!r} there and {value!r} here")
        if not 0 <= member.client < self.clients or member.samples < 1:
            raise ValueError(f"{who} with {member.samples} samples; expected one below {self.clients} with some")
        if member.split and (member.data, member.split) != (self.data, self.split):
            raise ValueError(f"{who}: its data set or split is another than the server's; install the same data there")
        return member

    def nodes_of(self, client: int) -> list[int]:
        """The nodes that claim to be this client."""
        return [node for node, member in self.claims.items() if member.client == client]

    def find(self, cohort: Iterable[int]) -> dict[int, list[int]]:
        """The nodes of each client: one, unless it is gone. A node that is new, or is back while Flower still takes the
        one before it for alive, has `reply_timeout` to make clear who it is."""
        deadline = time.monotonic() + self.reply_timeout
        while True:
            self.greet()
            nodes = {client: self.nodes_of(client) for client in cohort}
            counts = {len(found) for found in nodes.values()}
            if counts == {1} or (max(counts) < 2 and not self.asked) or time.monotonic() > deadline:
                return nodes
            time.sleep(POLL_SECONDS)

    def exchange(self, offers: Mapping[int, bytes], memories: Mapping[int, Memory], t: int) -> dict[int, Future]:
        """Send round t's offers, wait for the replies. Returns a future per client, in the order of `offers`, that is
        done: (reply, memory, account), or what went wrong with this client. A memory here is a token, one tensor."""
        contents = {
            client: pack({"round": t, TOKEN: token_of(memories.get(client))}, offer) for client, offer in offers.items()
        }

        def outcome(words: dict, reply: Message, samples: int) -> tuple[Message, Memory, Account]:
            token = typed(words, TOKEN, str)
            memory = {TOKEN: torch.tensor(list(token.encode()), dtype=torch.uint8)} if token else {}
            return reply, memory, Account(samples, typed(words, "loss", float))

        return self._exchanged(contents, MessageType.TRAIN, t, outcome)

    def inquire(self, questions: Mapping[int, bytes], t: int) -> dict[int, Future]:
        """The same for a further exchange of round t: (answer, {}, None)."""
        contents = {client: pack({"round": t}, question) for client, question in questions.items()}
        return self._exchanged(contents, TELL, t, lambda words, answer, samples: (answer, EMPTY, None))

    def _exchanged(
        self, contents: Mapping[int, RecordDict], kind: str, t: int, outcome: Callable[[dict, Message, int], tuple]
    ) -> dict[int, Future]:
        """Send each client its content, wait for the answers. In each future is `outcome(words, answer, samples)`."""
        nodes = self.find(contents)
        sent = {nodes[client][0]: content for client, content in contents.items() if len(nodes[client]) == 1}
        answers, futures = self.ask(sent, kind, self.reply_timeout), {}
        for client, content in contents.items():
            futures[client] = Future()
            try:
                words, message = self._answer(client, nodes[client], answers, len(unpack(content)[1]), t)
                made = outcome(words, message, self.claims[nodes[client][0]].samples)
            except Exception as error:
                futures[client].set_exception(error)
            else:
                futures[client].set_result(made)
        return futures

    def _answer(
        self, client: int, nodes: list[int], answers: Mapping[int, Envelope], sent: int, t: int
    ) -> tuple[dict, Message]:
        if len(nodes) != 1:
            others = "; ".join(self.refused.values())
            raise Refused(f"{len(nodes)} nodes claim to be it; expected one" + (f" ({others})" if others else ""))
        if nodes[0] not in answers:
            raise TimeoutError(f"no reply within {self.reply_timeout:g} s")
        words, payload = _words_of(answers[nodes[0]])
        for name, value in {"client": client, "run": self.run_id, "round": t, "received": sent}.items():
            if words.get(name) != value:
                raise ValueError(f"the reply's {name}: {words.get(name)!r}; expected {value!r}")
        return words, received(payload, self.layout, self.device)

    def ask(self, contents: Mapping[int, RecordDict], kind: str, timeout: float) -> dict[int, Envelope]:
        """Send each node its content. Returns what answered within `timeout` seconds, by node."""
        nodes, answers = self.send(contents, kind, timeout), {}
        deadline = time.monotonic() + timeout
        while nodes and time.monotonic() < deadline:
            answers.update(self.answered(nodes))
            if nodes:
                time.sleep(POLL_SECONDS)
        return answers

    def send(self, contents: Mapping[int, RecordDict], kind: str, timeout: float) -> dict[str, int]:
        """Send each node its content. Returns the messages' numbers, with the node of each."""
        sent = {}
        for node, content in contents.items():
            envelope = Envelope(content, dst_node_id=node, message_type=kind, ttl=timeout + SPARE_SECONDS)
            sent |= {number: node for number in self.grid.push_messages([envelope]) if number}
        return sent

    def answered(self, nodes: dict[str, int]) -> list[tuple[int, Envelope]]:
        """The (node, answer) that are there by now, taken out of `nodes`."""
        there = self.grid.pull_messages(list(nodes)) if nodes else []
        return [(nodes.pop(answer.metadata.reply_to_message_id), answer) for answer in there]


def _words_of(answer: Envelope) -> tuple[dict, bytes]:
    """(words, payload) of an answer that is one.

    Raises:
        Diverged, Refused: the client's own failure, in its words, or the network's. ValueError: no such message.
    """
    if answer.has_error():
        raise Refused(f"Flower's error {answer.error.code}: {answer.error.reason}")
    words, payload = unpack(answer.content)
    if "failure" in words:
        failure = str(words["failure"])
        raise Diverged(failure.removeprefix("Diverged: ")) if failure.startswith("Diverged: ") else Refused(failure)
    return words, payload


def token_of(memory: Memory | None) -> str:
    """The token in place of a memory; empty for none."""
    return bytes(memory[TOKEN].tolist()).decode() if memory else ""
