"""Laws of failing clients: whatever one sends, or does not send, the policy decides; the state is never half merged."""

import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import Remembering, environment, names, same_history, tiny_config

from feddip_lite import run
from feddip_lite.core.errors import ClientFailure
from feddip_lite.core.message import decode, encode
from feddip_lite.methods import METHODS
from feddip_lite.methods.mpfl import MPFL
from feddip_lite.methods.snip import SNIP
from feddip_lite.train.checkpoint import load_checkpoint
from feddip_lite.train.round import run_round, sample_cohort, train_client

CPU = torch.device("cpu")
PATIENCE = 1.0  # seconds a client may train; twice that, and a silent one is given up
MODEL = {"model": "resnet18", "width": 0.02, "clients": 60, "clients_per_round": 3, "partition": "dirichlet"}


def with_values(change):
    return lambda reply, method: replace(reply, values=change(reply.values.clone()))


def with_extra(name, change):
    def damaged(reply, method):
        extras = dict(reply.extras)
        extras[name] = change(extras[name].clone())
        return replace(reply, extras=extras)

    return damaged


def without(name):
    return lambda reply, method: replace(reply, extras={k: v for k, v in reply.extras.items() if k != name})


def over_the_wire(damage):
    """The reply, decoded from bytes that were damaged on their way."""
    return lambda reply, method: decode(damage(encode(reply)), method.layout)


def masked(length, kept):
    """A mask of `length` weights less than there are, and values for all of it but `kept`."""

    def damaged(reply, method):
        mask = torch.ones(method.layout.prunable - length, dtype=torch.bool)
        return replace(reply, mask=mask, values=reply.values[: len(reply.values) - length - kept])

    return damaged


def raise_(error):
    def damaged(reply, method):
        raise error

    return damaged


def never(reply, method):
    threading.Event().wait()


BAD = {
    "a NaN": (with_values(lambda v: v.index_fill_(0, torch.tensor([3]), torch.nan)), "values: NaN or infinite"),
    "an infinity": (with_values(lambda v: v.index_fill_(0, torch.tensor([0]), torch.inf)), "values: NaN or infinite"),
    "a NaN among statistics": (with_extra("buffers", lambda b: b * torch.nan), "buffers: NaN or infinite"),
    "a loss that is NaN": (with_extra("loss", lambda x: x * torch.nan), "loss: NaN or infinite"),
    "too few values": (with_values(lambda v: v[:-1]), "of them; expected"),
    "too many values": (with_values(lambda v: torch.cat([v, v[:1]])), "of them; expected"),
    "no values": (with_values(lambda v: v[:0]), "0 of them; expected"),
    "one value for all": (with_values(lambda v: v[:1]), "1 of them; expected"),
    "values as a matrix": (with_values(lambda v: v[None]), "one dimension"),
    "values as doubles": (with_values(lambda v: v.double()), "float64"),
    "a mask of another length": (masked(1, 0), "mask: .* weights; expected"),
    "a mask of one weight": (lambda r, m: replace(r, mask=torch.ones(1, dtype=torch.bool)), "mask: 1 weights"),
    "fewer values than its mask keeps": (masked(0, 1), "of them; expected"),
    "too few statistics": (with_extra("buffers", lambda b: b[:-1]), "buffers|no mean"),
    "one statistic for all": (with_extra("buffers", lambda b: b[:1]), "buffers|no mean"),
    "no statistics": (without("buffers"), "buffers"),
    "samples it has not": (with_extra("samples", lambda s: s * 1000), "samples: .* is not valid; expected"),
    "no samples": (with_extra("samples", lambda s: s * 0), r"samples: \[0\] is not valid"),
    "samples below zero": (with_extra("samples", lambda s: -s), "samples: .* is not valid"),
    "no word of samples": (without("samples"), "samples: missing"),
    "no word of its loss": (without("loss"), "loss: missing"),
    "another version": (over_the_wire(lambda data: data[:4] + b"\2" + data[5:]), "2, must be b'FDIP' 1"),
    "half a message": (over_the_wire(lambda data: data[: len(data) // 2]), "damaged or cut"),
    "a message with a flipped bit": (over_the_wire(lambda data: data[:40] + b"\xff" + data[41:]), "checksum"),
    "another program's bytes": (over_the_wire(lambda data: b"GET / HTTP/1.1\r\n\r\n" * 9), "begins b'GET "),
    "no message": (lambda reply, method: None, "NoneType"),
    "an exception": (raise_(RuntimeError("out of battery")), "RuntimeError: out of battery"),
    "an exception without words": (raise_(KeyError()), "KeyError"),
    "an exit": (raise_(SystemExit("bye")), "bye"),
    "no answer in time": (lambda reply, method: time.sleep(4 * PATIENCE), "no reply within 2 s"),
    "no answer ever": (never, "TimeoutError: no reply within 2 s"),
}
"""What a client sends in place of its reply, and what is said of it."""


@dataclass(frozen=True)
class Faulty(Remembering):
    """`Remembering`, of whose clients `victim` damages what it sends in round 1."""

    def reply(self, result, memory, t):
        reply, memory = super().reply(result, memory, t)
        if (t, result.client) == (1, self.victim):
            reply = self.damage(reply)
        return reply, memory


def faulty(monkeypatch, damage, policy="abort", **settings):
    """(configuration, victim) of a federation in which the middle client of round 1 fails."""
    config = tiny_config(**{**MODEL, "rounds": 3, "on_client_failure": policy, **settings})
    victim = sample_cohort(config, 1)[1]
    own = {"victim": victim, "damage": lambda self, reply: damage(reply, self)}
    monkeypatch.setitem(METHODS, "faulty", type("Acting", (Faulty,), own))
    return replace(config, method="faulty"), victim


def tensors(state):
    return [state.weights, state.buffers, state.mask, *state.memory.values()]


def after_one_round(federation, config):
    state, clients, method = federation(config)
    state, _ = run_round(state, clients, method, config.resolved())
    return state, clients, method


def patience_for(case):
    return {"client_timeout": PATIENCE} if "answer" in case else {}


@pytest.mark.parametrize("case", BAD)
def test_abort_names_round_client_and_reason_and_leaves_the_state_as_it_was(monkeypatch, federation, case):
    damage, reason = BAD[case]
    config, victim = faulty(monkeypatch, damage, **patience_for(case))
    state, clients, method = after_one_round(federation, config)
    before = [tensor.clone() for tensor in tensors(state)]
    memories = {client: memory["times"].clone() for client, memory in state.memories.items()}
    with pytest.raises(ClientFailure) as caught:
        run_round(state, clients, method, config.resolved())
    assert re.match(f"round 1, client {victim}: .*({reason})", str(caught.value))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(state), strict=True))
    assert {client: memory["times"] for client, memory in state.memories.items()} == memories


@pytest.mark.parametrize("case", BAD)
def test_skip_merges_the_rest_with_its_own_weights_and_records_who_was_left_out(monkeypatch, federation, case):
    damage, reason = BAD[case]
    config, victim = faulty(monkeypatch, damage, "skip", **patience_for(case))
    state, clients, method = after_one_round(federation, config)
    new, record = run_round(state, clients, method, config.resolved())
    assert list(record.skipped) == [victim]
    assert re.search(reason, record.skipped[victim])
    changed = [client for client, memory in new.memories.items() if memory is not state.memories.get(client)]
    assert len(changed) == 2 and victim not in changed
    others = {client: len(clients.train[client]) for client in sample_cohort(config, 1) if client != victim}
    assert len(set(others.values())) == 2  # unlike weights
    honest = Remembering(method.layout, config.rounds, config.seed)
    replies = {}
    for client in others:
        offer = honest.offer(state, 1, client)
        job = clients.workers.submit(
            train_client, honest, offer, state.memories.get(client, {}), clients, config.resolved(), 1, client
        )
        replies[client] = job.result()[0]
    expected = honest.merge(state, replies, 1)
    assert all(torch.equal(a, b) for a, b in zip(tensors(new), tensors(expected), strict=True))


@pytest.mark.parametrize("method", [SNIP, MPFL], ids=lambda method: method.__name__)
def test_scores_and_votes_of_one_number_are_not_spread_over_all_weights(monkeypatch, federation, method):
    config = tiny_config(on_client_failure="skip")
    victim = sample_cohort(config, 0)[1]

    class Short(method):
        def reply(self, result, memory, t):
            reply, memory = super().reply(result, memory, t)
            if result.client != victim:
                return reply, memory
            extras = {name: part[:1] for name, part in reply.extras.items()}
            return replace(reply, mask=reply.mask if reply.mask is None else reply.mask[:1], extras=extras), memory

    monkeypatch.setitem(METHODS, "short", Short)
    config = replace(config, method="short").resolved()
    state, clients, method = federation(config)
    _, record = run_round(state, clients, method, config)
    assert list(record.skipped) == [victim]


def test_several_clients_that_never_answer_are_all_given_up_and_the_run_goes_on(monkeypatch, federation):
    config, _ = faulty(monkeypatch, never, "skip", client_timeout=0.5, workers=1)

    class Silent(Remembering):
        def plan(self, offer, memory, t):
            if t == 0 and next(turns) < 2:
                threading.Event().wait()
            return super().plan(offer, memory, t)

    turns = iter(range(9))
    monkeypatch.setitem(METHODS, "faulty", Silent)
    state, clients, method = federation(config)
    state, record = run_round(state, clients, method, config.resolved())
    assert list(record.skipped) == sample_cohort(config, 0)[:2]
    state, record = run_round(state, clients, method, config.resolved())
    assert record.skipped == {}


def test_failed_round_costs_nothing_that_was_saved(tmp_path, monkeypatch):
    config, victim = faulty(monkeypatch, BAD["too few values"][0])
    with pytest.raises(ClientFailure, match=f"round 1, client {victim}"):
        run(config, results_dir=tmp_path, checkpoint_every=1, progress=False)
    assert names(tmp_path) == [f"{config.run_id}.checkpoint"]
    assert load_checkpoint(tmp_path / f"{config.run_id}.checkpoint", config, CPU).state.round == 1
    config, _ = faulty(monkeypatch, lambda reply, method: reply)  # the client was repaired
    assert same_history(run(config, results_dir=tmp_path, progress=False), run(config, progress=False))


STUCK = """
import sys, threading
from feddip_lite import __main__
from feddip_lite.methods import METHODS
from feddip_lite.methods.fedavg import FedAvg

class Stuck(FedAvg):
    def plan(self, offer, memory, t):
        threading.Event().wait()

METHODS["stuck"] = Stuck
sys.exit(__main__.main(["run", "--method=stuck", "--client-timeout=0.5", "--quiet", f"--results={sys.argv[1]}"]))
"""


@pytest.mark.slow
def test_process_whose_clients_all_hang_ends_all_the_same(tmp_path):
    command = [sys.executable, "-c", STUCK, str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r".*: round 0, client \d+: TimeoutError: no reply within 1 s\n", done.stderr)
