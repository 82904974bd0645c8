"""A Flower grid of one process: its nodes are calls of the client's own functions, its network a dictionary."""

import json
from collections import Counter
from dataclasses import asdict
from types import SimpleNamespace

from flwr.app import Message as Envelope

from feddip_lite.flower import client as flower_client
from feddip_lite.flower import server as flower
from feddip_lite.flower.wire import pack, unpack
from feddip_lite.train.observe import Progress
from feddip_lite.train.round import run_round
from feddip_lite.train.setup import prepare


class Grid:
    """Replies come in the opposite order of the questions.

    Args:
        nodes: node id -> its configuration; default: one per client.
        spoil: `spoil(client, kind, words, payload)` -> what arrives in place of (words, payload), or None for silence.
    """

    def __init__(self, config, folder, nodes=None, spoil=lambda client, kind, words, payload: (words, payload)):
        self.settings = {"config": json.dumps(asdict(config))}
        self.nodes = nodes or {100 + client: {"partition-id": client} for client in range(config.clients)}
        self.folder, self.spoil = folder, spoil
        self.waiting, self.count = {}, 0
        self.bytes = Counter()

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, envelopes):
        numbers = []
        for envelope in envelopes:
            self.count += 1
            numbers.append(f"message {self.count}")
            envelope.metadata.__dict__["_message_id"] = numbers[-1]
            self.waiting[numbers[-1]] = envelope
            self.bytes["down"] += len(unpack(envelope.content)[1])
        return numbers

    def pull_messages(self, numbers):
        return [answer for number in reversed(numbers) if (answer := self.answer(number)) is not None]

    def answer(self, number):
        """The reply to a message, once."""
        if (envelope := self.waiting.pop(number, None)) is None:
            return None
        kind, own = envelope.metadata.message_type, self.nodes[envelope.metadata.dst_node_id]
        folder = {"memories": str(self.folder / f"client {own['partition-id']}")}
        context = SimpleNamespace(node_config={**folder, **own}, run_config=self.settings)
        work = {"query": flower_client.query, "train": flower_client.train, "train.tell": flower_client.tell}
        answer = work[kind](envelope, context)
        spoilt = self.spoil(own["partition-id"], kind, *unpack(answer.content))
        if spoilt is None:
            return None
        self.bytes["up"] += len(spoilt[1])
        return Envelope(pack(*spoilt), reply_to=envelope)


def over(grid, join=0.2, reply=0.2):
    """Clients behind `grid`, with these time limits in seconds."""
    return lambda clients, method, config: flower.connected(grid, (join, reply), clients, method, config)


def here(clients, method, config):
    """Clients in this process."""
    return clients


def start(config, connect):
    """(progress before round 0, a function that does one more round and returns its record)."""
    config = config.resolved()
    state, clients, method = prepare(config)
    progress = Progress(state)
    clients = connect(clients, method, config)

    def one_more():
        state, record = run_round(progress.state, clients, method, config)
        progress.take(state, record)
        return record

    return progress, one_more


def finished(config, connect):
    """(progress after all rounds, the records of its rounds)."""
    progress, one_more = start(config, connect)
    return progress, [one_more() for _ in range(config.rounds)]
