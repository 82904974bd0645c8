"""Laws of the adapter to Flower, on a grid of this process: no network, no other processes."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FAST, tiny_config

flwr = pytest.importorskip("flwr", reason="the extra feddip-lite[flower] is not installed (make flower)")

from flwr.app import Message as Envelope  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

from feddip_lite import flower, flower_client  # noqa: E402
from feddip_lite.checkpoint import Progress  # noqa: E402
from feddip_lite.engine import advance, execute  # noqa: E402
from feddip_lite.failures import ClientFailure  # noqa: E402
from feddip_lite.federation import prepare  # noqa: E402
from feddip_lite.flower_link import Unreachable  # noqa: E402
from feddip_lite.flower_wire import pack, unpack  # noqa: E402


@pytest.fixture(autouse=True)
def inside_a_run(monkeypatch):
    """Flower lets messages be made only inside a run of its own."""
    monkeypatch.setattr(TaskIdentity, "_task_id", 1)
    monkeypatch.setattr(TaskIdentity, "_run_id", 1)
    monkeypatch.setattr(TaskIdentity, "_node_id", 1)


class Grid:
    """A grid whose nodes answer when asked for their replies, the last one first. `nodes`: node id to its configuration;
    `spoil(node, kind, words, payload)` may change a reply, or return None for silence."""

    def __init__(self, config, folder, nodes=None, spoil=None):
        self.settings = {"config": json.dumps(config_dict(config))}
        self.nodes = nodes or {100 + client: {"partition-id": client} for client in range(config.clients)}
        self.folder, self.spoil = folder, spoil or (lambda node, kind, words, payload: (words, payload))
        self.sent, self.asked = {}, []

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, envelopes):
        for envelope in envelopes:
            number = f"message {len(self.sent)}"
            envelope.metadata.__dict__["_message_id"] = number
            self.sent[number] = envelope
        return [number]

    def pull_messages(self, numbers):
        return [answer for number in reversed(numbers) if (answer := self.answer(number)) is not None]

    def answer(self, number):
        envelope = self.sent.pop(number, None)
        if envelope is None:
            return None
        node, kind = envelope.metadata.dst_node_id, envelope.metadata.message_type
        self.asked.append((node, kind))
        own = {"memories": str(self.folder / "memories" / str(node)), **self.nodes[node]}
        context = SimpleNamespace(node_config=own, run_config=self.settings)
        answer = {"query": flower_client.query, "train": flower_client.train}[kind](envelope, context)
        spoilt = self.spoil(node, kind, *unpack(answer.content))
        return None if spoilt is None else Envelope(pack(*spoilt), reply_to=envelope)


def config_dict(config):
    from dataclasses import asdict

    return asdict(config)


def finished(config, connect=lambda clients, *_: clients):
    """(progress after all rounds, columns of its history without seconds)."""
    config = config.resolved()
    state, clients, method = prepare(config)
    progress = Progress(state)
    clients = connect(clients, method, config)
    records = [advance(progress, clients, method, config) for _ in range(config.rounds)]
    clients.workers.close()
    return progress, [replace(record, memories={}) for record in records]


def over(grid, join=1.0, reply=20.0):
    return lambda clients, method, config: flower.connected(grid, (join, reply), clients, method, config)


METHODS = {
    "fedavg": {},
    "feddip": {},
    "feddst": {"preset": "repo", "mask_interval": 1},
}


@pytest.mark.parametrize("method", METHODS)
def test_the_same_bits_as_in_one_process(method, tmp_path):
    config = tiny_config(method=method, **METHODS[method])
    here, records = finished(config)
    there, remote = finished(config, over(Grid(config, tmp_path)))
    for name in ("weights", "buffers", "mask"):
        assert torch.equal(getattr(here.state, name), getattr(there.state, name))
    assert repr(records) == repr(remote)
    assert set(here.memories) == set(there.memories)
