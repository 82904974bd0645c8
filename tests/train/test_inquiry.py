"""Laws of a round's further exchanges, and of the screened upload that needs them: nothing changes but the bytes."""

from concurrent.futures import Future
from dataclasses import dataclass, fields

import pytest
import torch
from conftest import random_bools, random_vector, reply_of, state_of, tiny_config

from feddip_lite.core.errors import ClientFailure
from feddip_lite.core.message import Message, num_bytes
from feddip_lite.core.plan import LocalResult
from feddip_lite.core.sparsity import num_kept
from feddip_lite.methods.fedavg import FedAvg
from feddip_lite.methods.feddip import FedDP
from feddip_lite.train.evaluate import evaluate_state
from feddip_lite.train.inquiry import own_of
from feddip_lite.train.round import Clients, run_round
from feddip_lite.train.setup import prepare

SCREENED = {"method_options": {"upload": "screened"}}
TWO_CLASSES = {"partition": "pathological", "rounds": 6, "mask_interval": 2, "lr": 0.3}


def method_of(layout, **changes):
    own = {"rounds": 10, "seed": 0, "initial_sparsity": 0.5, "target_sparsity": 0.8, "mask_interval": 1}
    return FedDP(**{"layout": layout, **own, "upload": "screened", **changes})


def conversation(method, state, vectors, samples, t=3):
    """(the replies that `merge` reads, the questions) where clients hold these dense vectors, (n,) each."""
    own = {n: Message(vector, state.mask) for n, vector in enumerate(vectors)}
    packed = {
        n: reply_of(method.layout.pack(vector, state.mask), count, state.buffers)
        for n, (vector, count) in enumerate(zip(vectors, samples, strict=True))
    }
    asking, answers, questions = method.inquire(state, packed, t), None, []
    try:
        while True:
            questions.append(asking.send(answers))
            answers = {n: method.tell(questions[-1], own[n], t) for n in packed}
    except StopIteration as end:
        return end.value, questions


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("levels", [0, 4])  # of magnitude: few of them make many ties
def test_the_mask_and_its_weights_are_those_of_dense_uploads_to_the_bit(layout, seed, levels):
    method, dense = method_of(layout), method_of(layout, upload="dense")
    state = state_of(layout, random_bools(layout.prunable, 0.45, seed))
    vectors = [random_vector(layout.size, 10 * seed + n) for n in range(3)]
    vectors = [(v * levels).round() / levels for v in vectors] if levels else vectors
    for vector in vectors:  # as in training: what is pruned is mostly small
        vector[: layout.prunable][~state.mask] *= 0.5
    samples = (7, 20, 13)
    replies, questions = conversation(method, state, vectors, samples)
    full = {n: reply_of(v, s, state.buffers) for n, (v, s) in enumerate(zip(vectors, samples, strict=True))}
    expected, found = dense.merge(state, full, 3), method.merge(state, replies, 3)
    assert torch.equal(expected.mask, found.mask)
    assert torch.equal(layout.masked(expected.weights, expected.mask), layout.masked(found.weights, found.mask))
    assert bool((expected.mask & ~state.mask).any())
    assert len(questions) == 2
    assert 0 < int(questions[1].mask.sum()) < int((~state.mask).sum())


def test_a_mask_that_keeps_more_than_the_one_before_asks_for_all_that_is_pruned(layout):
    method = method_of(layout, initial_sparsity=0.2, target_sparsity=0.2)
    state = state_of(layout, random_bools(layout.prunable, 0.5))
    vectors = [random_vector(layout.size, n) for n in range(2)]
    replies, questions = conversation(method, state, vectors, (1, 1))
    assert torch.equal(questions[1].mask, ~state.mask)
    assert all(torch.equal(reply.values, vector) for reply, vector in zip(replies.values(), vectors, strict=True))


def test_where_nothing_can_enter_there_is_one_question_of_one_number(layout):
    method = method_of(layout)
    state = state_of(layout, random_bools(layout.prunable, 0.9))
    vector = random_vector(layout.size)
    vector[: layout.prunable] = torch.where(state.mask, 1 + vector[: layout.prunable].abs(), 0.1)
    replies, (question,) = conversation(method, state, [vector], (1,))
    assert torch.equal(replies[0].values, layout.pack(vector, state.mask))
    kept = vector[: layout.prunable][state.mask].sort(descending=True).values
    assert question.extras["threshold"].tolist() == [kept[num_kept(method.sparsity(3), layout.prunable) - 1]]


def test_nothing_is_asked_before_anything_is_pruned(layout):
    replies, questions = conversation(method_of(layout), state_of(layout), [random_vector(layout.size)], (1,), t=0)
    assert questions == []


def test_by_default_a_method_asks_nothing_and_its_clients_answer_what_a_mask_keeps(layout):
    method = FedAvg(layout=layout, rounds=1, seed=0)
    replies = {0: Message()}
    with pytest.raises(StopIteration) as end:
        next(method.inquire(state_of(layout), replies, 0))
    assert end.value.value is replies
    assert not method.inquires(0)
    own, wanted = Message(random_vector(layout.size)), random_bools(layout.prunable)
    assert torch.equal(method.tell(Message(None, wanted), own, 0).values, own.values[: layout.prunable][wanted])
    with pytest.raises(ValueError, match="the question has no mask, and FedAvg answers no other"):
        method.tell(Message(), own, 0)


def rounds_of(**changes):
    """[(state, record), ...] of a run, and its layout."""
    config = tiny_config(**{**TWO_CLASSES, **changes}).resolved()
    state, clients, method = prepare(config)
    done = []
    for _ in range(config.rounds):
        state, record = run_round(state, clients, method, config)
        done.append((state, record, evaluate_state(state, clients)))
    clients.workers.close()
    return done, method


@pytest.mark.parametrize("changes", [{}, {"method_options": {"erk": "shared"}}, {"method_options": {"erk": "none"}}])
def test_a_screened_run_is_the_dense_run_for_fewer_bytes_than_a_masked_one(changes):
    own = changes.get("method_options", {})
    runs = {upload: rounds_of(method_options={**own, "upload": upload}) for upload in ("dense", "masked", "screened")}
    layout = runs["dense"][1].layout
    for dense, masked, screened in zip(*(done for done, _ in runs.values()), strict=True):
        (a, a_record, a_metrics), (_, m_record, _), (b, b_record, b_metrics) = dense, masked, screened
        assert torch.equal(a.mask, b.mask)
        assert torch.equal(layout.masked(a.weights, a.mask), layout.masked(b.weights, b.mask))
        assert a_metrics == b_metrics
        assert (a_record.train_loss, a_record.regrown) == (b_record.train_loss, b_record.regrown)
        t, further = a_record.round, b_record.exchange.further
        assert bool(further) == (t % 2 == 0 and (t > 0 or own.get("erk") == "shared"))
        assert b_record.up_bytes < m_record.up_bytes if further else b_record.up_bytes == m_record.up_bytes
    assert sum(record.regrown for _, record, _ in runs["dense"][0][1:]) > 0


def test_bytes_of_questions_and_answers_are_charged():
    done, _ = rounds_of(**SCREENED)
    record = done[2][1]
    (down, up), exchange = zip(*record.exchange.further, strict=True), record.exchange
    for charged, first, more in (
        (record.down_bytes, exchange.offers, down),
        (record.up_bytes, exchange.replies, up),
    ):
        messages = [message for each in (first, *more) for message in each.values()]
        assert charged == sum(num_bytes(message) for message in messages)
        assert len(messages) == len(exchange.offers) * (1 + len(more))


@pytest.mark.parametrize(
    "settings", [{"preset": "repo"}, {"method_options": {"upload": "masked"}}, {"mask_interval": 9}]
)
def test_a_round_has_one_exchange_where_nothing_more_is_to_be_known(settings):
    options = {"upload": "screened", **settings.get("method_options", {})}
    done, _ = rounds_of(**{**settings, "method_options": options, "rounds": 4})
    assert all(record.exchange.further == () for _, record, _ in done)


# ---- clients that fail in a further exchange


@dataclass(frozen=True, kw_only=True)
class Spoilt(Clients):
    """Clients, one of which answers some questions otherwise: `spoil(question, answer)` is its answer."""

    faulty: int
    spoil: object

    def ask(self, method, questions, results, t):
        futures = super().ask(method, questions, results, t)
        if self.faulty in futures:
            answer, *rest = futures[self.faulty].result()
            futures[self.faulty] = Future()
            try:
                futures[self.faulty].set_result((self.spoil(questions[self.faulty], answer), *rest))
            except ValueError as error:
                futures[self.faulty].set_exception(error)
        return futures


def fails(at):
    """A client that fails at the question of this number, 0 or 1, of a round."""

    def spoil(question, answer):
        if (question.mask is not None) == bool(at):
            raise ValueError("power cut")
        return answer

    return spoil


def spoilt_round(spoil, policy="skip", t=2):
    """(state before round t, who failed, a function that does the round)."""
    config = tiny_config(**TWO_CLASSES, **SCREENED, on_client_failure=policy).resolved()
    state, clients, method = prepare(config)
    for _ in range(t):
        state, record = run_round(state, clients, method, config)
    probe = run_round(state, clients, method, config)[1]
    faulty = sorted(probe.exchange.offers)[1]
    plain = {item.name: getattr(clients, item.name) for item in fields(clients)}
    return state, faulty, lambda: run_round(state, Spoilt(**plain, faulty=faulty, spoil=spoil), method, config)


@pytest.mark.parametrize("at", [0, 1])
def test_a_client_lost_in_a_further_exchange_is_one_that_failed_in_the_round(at):
    state, faulty, round_ = spoilt_round(fails(at))
    found, record = round_()
    assert dict(record.skipped) == {faulty: "ValueError: power cut"}
    config = tiny_config(**TWO_CLASSES, on_client_failure="skip").resolved()  # dense uploads
    _, clients, method = prepare(config)
    offers = {client: method.offer(state, 2, client) for client in record.exchange.offers if client != faulty}
    jobs = clients.deliver(method, offers, state, config)
    expected = method.merge(state, {client: job.result()[0] for client, job in jobs.items()}, 2)
    assert torch.equal(expected.mask, found.mask)
    masked = method.layout.masked
    assert torch.equal(masked(expected.weights, expected.mask), masked(found.weights, found.mask))
    assert len(record.exchange.further) == at + 1 + 2  # the others are asked anew
    assert faulty not in record.exchange.replies


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (fails(0), "ValueError: power cut"),
        (lambda q, a: Message() if q.mask is None else a, r"ValueError: the answer has no mask of \d+ weights"),
        (lambda q, a: Message(None, a.mask[1:]) if q.mask is None else a, r"the answer has no mask of \d+ weights"),
        (lambda q, a: a if q.mask is None else Message(a.values[1:]), "the answer's values: expected .* of them"),
        (lambda q, a: a if q.mask is None else Message(a.values / 0), "Diverged: the answer's values: NaN or infinite"),
    ],
)
def test_under_abort_a_bad_answer_names_round_and_client_and_leaves_the_state_alone(spoil, reason):
    state, faulty, round_ = spoilt_round(spoil, "abort")
    before = state.weights.clone(), state.mask.clone()
    with pytest.raises(ClientFailure, match=f"round 2, client {faulty}: .*{reason}"):
        round_()
    assert torch.equal(before[0], state.weights) and torch.equal(before[1], state.mask)


def test_a_client_keeps_for_questions_its_dense_weights_and_its_mask(layout):
    mask = random_bools(layout.prunable)
    empty = torch.empty(0)
    result = LocalResult(random_vector(layout.size), empty, mask, 3, empty, torch.zeros(()))
    own = own_of(result)
    assert torch.equal(own.values, result.weights) and torch.equal(own.mask, mask)
