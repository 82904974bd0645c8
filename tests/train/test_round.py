"""Laws of the round: cohorts, purity, worker counts, bytes that really travel, records, failing clients."""

import math
import time
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import tiny_config

from feddip_lite.core.errors import ClientFailure
from feddip_lite.core.message import Message, encode
from feddip_lite.methods import METHODS
from feddip_lite.methods.fedavg import FedAvg
from feddip_lite.train.evaluate import evaluate_state
from feddip_lite.train.round import run_round, sample_cohort, train_client

MANY = {"clients": 60, "clients_per_round": 5}  # 24 samples each


def same_state(a, b):
    tensors = ["weights", "buffers", "mask"]
    return a.round == b.round and all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)


def reply_to(offer, clients, method, config, t, client):
    """What `client` answers to `offer` in round t."""
    return clients.workers.submit(train_client, method, offer, {}, clients, config, t, client).result()[0]


def test_cohort_has_exactly_k_distinct_clients_in_ascending_order():
    config = tiny_config(clients=50, clients_per_round=5)
    cohorts = [sample_cohort(config, t) for t in range(1000)]
    assert all(len(cohort) == 5 and cohort == sorted(set(cohort)) for cohort in cohorts)
    assert all(cohort[0] >= 0 and cohort[-1] < 50 for cohort in cohorts)
    times = torch.bincount(torch.tensor(cohorts).flatten(), minlength=50)
    assert times.min() > 50  # 100 on average: five standard deviations
    assert times.max() < 150


def test_cohort_is_a_function_of_seed_and_round():
    config = tiny_config(clients=50, clients_per_round=5)
    assert sample_cohort(config, 3) == sample_cohort(tiny_config(clients=50, clients_per_round=5, method="fedavg"), 3)
    assert len({tuple(sample_cohort(replace(config, seed=seed), t)) for seed in range(5) for t in range(5)}) == 25


def test_cohort_of_all_clients_is_all_clients():
    assert sample_cohort(tiny_config(clients=6, clients_per_round=6), 9) == list(range(6))


@pytest.mark.parametrize("preset", ["paper", "repo", "memory"])
def test_run_round_is_pure(federation, preset):
    config = tiny_config(preset=preset).resolved()
    state, clients, method = federation(config)
    data = clients.data
    given = [state.weights, state.mask, data.train_images, data.train_labels, *clients.train]
    before = [tensor.clone() for tensor in given]
    (one, first), (two, second) = (run_round(state, clients, method, config) for _ in range(2))
    assert same_state(one, two)
    assert repr(first) == repr(second)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    assert state.round == 0
    assert state.memories == {}


@pytest.mark.parametrize("method", ["feddip", "fedprox"])
def test_worker_count_never_changes_a_bit(train, method):
    one, *others = (train(tiny_config(method=method, workers=count, **MANY)) for count in (1, 2, 3, 5))
    for other in others:
        assert all(same_state(a, b) for (a, _), (b, _) in zip(one, other, strict=True))
        assert [repr(record) for _, record in one] == [repr(record) for _, record in other]


@pytest.mark.parametrize(("model", "width"), [("alexnet", 0.05), ("resnet18", 0.05)])
def test_worker_count_never_changes_a_bit_with_dropout_or_batchnorm(federation, model, width):
    results = []
    for workers in (1, 3):
        config = tiny_config(model=model, width=width, workers=workers, **MANY).resolved()
        state, clients, method = federation(config)
        state, record = run_round(state, clients, method, config)
        results.append((state, repr(record), evaluate_state(state, clients)))
    assert same_state(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]


def test_every_worker_uses_one_thread_whatever_the_caller_uses(federation):
    torch.set_num_threads(2)
    workers = federation(tiny_config(workers=3))[1].workers
    assert [workers.submit(lambda model: torch.get_num_threads()).result() for _ in range(6)] == [1] * 6
    assert torch.get_num_threads() == 2


@dataclass(frozen=True)
class Told(FedAvg):
    """FedAvg whose clients are told who they are; what they do with it is `act`'s to say."""

    def offer(self, state, t, client):
        offer = super().offer(state, t, client)
        return replace(offer, extras={**offer.extras, "client": torch.tensor([client])})

    def plan(self, offer, memory, t):
        self.act(int(offer.extras["client"][0]), t)
        return super().plan(offer, memory, t)

    def act(self, client, t):
        pass


def told(monkeypatch, act):
    monkeypatch.setitem(METHODS, "told", type("Acting", (Told,), {"act": staticmethod(act)}))
    return tiny_config(method="told", workers=3)


def test_order_of_arrival_never_changes_a_bit(monkeypatch, federation, train):
    config = told(monkeypatch, lambda client, t: None)
    plain = train(config)
    config = told(monkeypatch, lambda client, t: time.sleep(0.02 * (6 - client)))  # low ids answer last
    assert all(same_state(a, b) for (a, _), (b, _) in zip(plain, train(config), strict=True))


@pytest.mark.parametrize(
    "settings",
    [{"method": "fedavg"}, {}, {"preset": "repo"}, {"method_options": {"upload": "masked"}},
     {"model": "resnet18", "width": 0.02, "clients": 200}],
    ids=["fedavg", "paper", "repo", "masked upload", "batchnorm"],
)  # fmt: skip
def test_byte_columns_are_the_lengths_of_the_messages(federation, settings):
    config = tiny_config(rounds=2, **settings).resolved()
    state, clients, method = federation(config)
    for t in range(2):
        cohort = sample_cohort(config, t)
        offers = {client: method.offer(state, t, client) for client in cohort}
        replies = [reply_to(offers[client], clients, method, config, t, client) for client in cohort]
        state, record = run_round(state, clients, method, config)
        assert record.down_bytes == sum(len(encode(offer)) for offer in offers.values())
        assert record.up_bytes == sum(len(encode(reply)) for reply in replies)


def test_record_describes_the_round(federation):
    config = tiny_config(rounds=8, mask_interval=1, lr_decay=0.5, penalty_steps=4).resolved()
    state, clients, method = federation(config)
    for t in range(3):
        new, record = run_round(state, clients, method, config)
        prunable = len(new.mask)
        old, kept, weights = state.mask, new.mask, new.weights[:prunable].double()
        assert record.round == t
        assert record.lr == 0.1 * 0.5**t
        assert record.penalty == 1e-3 * (t // 2) / 4
        assert record.sparsity == 1 - int(kept.sum()) / prunable
        assert record.regrown == int((kept & ~old).sum())
        error = float(weights[~kept].square().sum() / weights.square().sum())
        assert record.pruning_error == pytest.approx(error, rel=1e-9)
        last, state = state, new
    assert not torch.equal(last.mask, state.mask)


def test_dense_method_has_no_pruning_error_and_no_sparsity(train):
    _, record = train(tiny_config(method="fedavg", rounds=1))[0]
    assert math.isnan(record.pruning_error)
    assert (record.sparsity, record.regrown, record.penalty) == (0.0, 0, 0.0)


def test_train_loss_is_the_mean_over_the_samples_of_the_cohort(federation):
    config = tiny_config(partition="dirichlet", rounds=1).resolved()
    state, clients, method = federation(config)
    cohort = sample_cohort(config, 0)
    _, record = run_round(state, clients, method, config)
    replies = [reply_to(method.offer(state, 0, c), clients, method, config, 0, c) for c in cohort]
    sizes = [len(clients.train[client]) for client in cohort]
    assert len(set(sizes)) > 1
    losses = [float(reply.extras["loss"][0]) for reply in replies]
    assert record.train_loss == pytest.approx(
        sum(a * b for a, b in zip(losses, sizes, strict=True)) / sum(sizes), rel=1e-12
    )


def test_client_memory_stays_with_its_client_and_comes_back_next_time(federation, remembering):
    config = tiny_config(method=remembering, rounds=6).resolved()
    state, clients, method = federation(config)
    times = dict.fromkeys(range(6), 0)
    for t in range(6):
        state, record = run_round(state, clients, method, config)
        for client in sample_cohort(config, t):
            times[client] += 1
        assert {client: int(memory["times"][0]) for client, memory in state.memories.items()} == {
            client: count for client, count in times.items() if count
        }


def fail(victims, when=1):
    def act(client, t):
        if t == when and client in victims:
            raise RuntimeError("out of battery")

    return act


def test_failing_client_aborts_the_run_naming_round_client_and_reason(monkeypatch, train):
    victim = sample_cohort(tiny_config(), 1)[1]
    with pytest.raises(ClientFailure, match=f"round 1, client {victim}: RuntimeError: out of battery"):
        train(told(monkeypatch, fail([victim])))


def test_skipped_client_is_recorded_and_the_rest_is_merged_with_its_own_weights(monkeypatch, federation):
    config = replace(told(monkeypatch, fail([])), partition="dirichlet", on_client_failure="skip").resolved()
    victim, *others = sample_cohort(config, 1)
    config = replace(config, method=told(monkeypatch, fail([victim])).method)
    state, clients, method = federation(config)
    state, record = run_round(state, clients, method, config)
    assert record.skipped == {}
    new, record = run_round(state, clients, method, config)
    assert record.skipped == {victim: "RuntimeError: out of battery"}
    offers = {client: method.offer(state, 1, client) for client in [victim, *others]}
    replies = {client: reply_to(offers[client], clients, method, config, 1, client) for client in others}
    sizes = [len(clients.train[client]) for client in others]
    mean = sum(replies[c].values.double() * (size / sum(sizes)) for c, size in zip(others, sizes, strict=True))
    assert torch.equal(new.weights, mean.float())
    assert record.up_bytes == sum(len(encode(reply)) for reply in replies.values())
    assert record.down_bytes == sum(len(encode(offer)) for offer in offers.values())  # it was sent before it failed


def test_round_in_which_every_client_fails_stops_the_run_even_under_skip(monkeypatch, train):
    config = told(monkeypatch, fail(range(6)))
    with pytest.raises(ClientFailure, match=r"round 1: every client failed; client \d: .*out of battery"):
        train(replace(config, on_client_failure="skip"))


def test_client_beyond_its_time_limit_is_a_failure(train):
    with pytest.raises(
        ClientFailure, match=r"round 0, client \d: .*(client_timeout = 1e-09 s|no reply within 2e-09 s)"
    ):
        train(tiny_config(client_timeout=1e-9))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_reply_that_is_not_finite_is_a_failure(monkeypatch, train, value):
    class Broken(FedAvg):
        def reply(self, result, memory, t):
            reply, memory = super().reply(result, memory, t)
            values = reply.values.clone()
            values[t] = value
            return Message(values, None, reply.extras), memory

    monkeypatch.setitem(METHODS, "broken", Broken)
    with pytest.raises(ClientFailure, match=r"round 0, client \d: .*NaN or infinite"):
        train(tiny_config(method="broken"))
