"""The federation: `run_round`, THE round, a pure function of a state.

    for each client of the cohort:   offer -> plan -> local update -> reply         then   merge

What the codecs of `transport.py` make of offers and replies is what travels; without codecs they travel as they are.
A method may ask for more before it merges (`inquiry.py`). State is a value; all that one round leaves to the next is
in `ServerState`. Read before: `methods/base.py` (the hooks); after: `client.py` (what a client does), `run.py` (many
rounds make a run).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace

from torch import Tensor

from ..config import Config
from ..core.flat import FlatModel, sha256_of
from ..core.message import Message, num_bytes
from ..core.plan import LocalPlan, LocalResult
from ..core.seeds import numpy_generator
from ..core.sparsity import density, nested_mask, num_kept
from ..core.state import EMPTY, Memory, ServerState
from ..data.datasets import Dataset
from ..methods.base import Method, samples_of
from .client import local_update, see_test_images
from .failures import collect_replies
from .inquiry import Asked, inquired, own_of, tell_client
from .mask_cache import held_part, packed
from .transport import answered, is_coded, methods_part, received, sent
from .workers import Workers


@dataclass(frozen=True)
class Clients:
    """The clients' data, and who trains on it. `train[i]`, `test[i]`: sample indices of client i, int64 on the device;
    `split_sha256`: the checksum of them all; `together(plans, data, train, t)`: local updates of several clients at
    once, by client id, of those plans for which it can; None = each trains by itself."""

    data: Dataset
    train: tuple[Tensor, ...]
    test: tuple[Tensor, ...]
    workers: Workers
    split_sha256: str = ""
    together: Callable[..., dict[int, LocalResult]] | None = None

    def deliver(
        self, method: Method, offers: Mapping[int, Message], state: ServerState, config: Config
    ) -> dict[int, Future]:
        """Hand every offer, as it travels, to its client. Returns what each makes of it: a future (reply as it travels,
        memory, result)."""
        t, memories = state.round, {client: state.memories.get(client, EMPTY) for client in offers}
        done = self.together and self.workers.submit(train_together, method, offers, memories, self, t)
        return {
            client: self.workers.submit(train_client, method, offer, memories[client], self, config, t, client, done)
            for client, offer in offers.items()
        }

    def ask(
        self, method: Method, questions: Mapping[int, Message], results: Mapping[int, LocalResult], t: int
    ) -> dict[int, Future]:
        """Hand every question of a further exchange to its client, whose training has left a result. Returns what each
        makes of it: a future (answer, {}, None)."""
        return {
            client: self.workers.submit(tell_client, method, question, own_of(results[client]), t)
            for client, question in questions.items()
        }

    def facts(self) -> dict:
        """What a run's provenance says of these clients."""
        return {"split_sha256": self.split_sha256, **({"trained": "together"} if self.together else {})}

    def digest(self, memory: Memory) -> str:
        """Checksum of a client's memory."""
        return sha256_of(memory)


@dataclass(frozen=True)
class Exchange:
    """What travelled in a round, for those who look at runs: the state before it, offers and replies by client id, as
    they travelled, what training left at clients in this process (of others there is only an account), and the
    `further` exchanges of the round, each questions and answers."""

    before: ServerState
    offers: Mapping[int, Message]
    replies: Mapping[int, Message]
    results: Mapping[int, LocalResult]
    further: tuple[Asked, ...] = ()


@dataclass(frozen=True)
class RoundRecord:
    """What one round did; fields as the columns of a results file. `skipped` names the clients that failed, with the
    reason."""

    round: int
    train_loss: float
    sparsity: float
    lr: float
    penalty: float
    up_bytes: int
    down_bytes: int
    regrown: int
    pruning_error: float
    skipped: Mapping[int, str]
    exchange: Exchange = field(compare=False, repr=False)


def sample_cohort(config: Config, t: int) -> list[int]:
    """The K clients of round t, ascending: uniform without replacement, a function of (seed, t)."""
    draw = numpy_generator(config.seed, "cohort", t)
    return sorted(draw.choice(config.clients, config.clients_per_round, replace=False).tolist())


def run_round(state: ServerState, clients: Clients, method: Method, config: Config) -> tuple[ServerState, RoundRecord]:
    """One federated round. Pure: the same inputs give the same bits, for any number of workers.

    Returns:
        (the next state, the record).

    Raises:
        ClientFailure: see `Config.on_client_failure`. The state is as it was.
    """
    t = state.round
    offers = {client: method.offer(state, t, client) for client in sample_cohort(config, t)}
    travelling = {client: sent(method, offer, t, client, state.held.get(client)) for client, offer in offers.items()}
    jobs = clients.deliver(method, travelling, state, config)  # each: plan -> local update -> reply, `train_client`
    found = collect_replies(jobs, clients.workers, method, offers, state, config)
    found, further = inquired(found, clients, method, state, config)
    merged = method.merge(state, found.replies, t)
    if config.final_prune and t == config.rounds - 1:
        merged = pruned_to(merged, config.target_sparsity)
    memories, estimates = {**state.memories, **found.memories}, {**state.estimates, **found.estimates}
    held = held_by(method, {client: offers[client].mask for client in found.replies})
    new = replace(merged, memories=memories, estimates=estimates, held={**state.held, **held})
    exchange = Exchange(state, travelling, found.answers, found.results, further)
    return new, record_of(new, exchange, found.skipped, method, config)


def held_by(method: Method, masks: Mapping[int, Tensor | None]) -> dict[int, Tensor]:
    """What clients hold whose replies were merged under these masks: nothing new without a `mask_cache`."""
    return {client: packed(mask) for client, mask in masks.items() if method.mask_cache and mask is not None}


def pruned_to(state: ServerState, sparsity: float) -> ServerState:
    """The state whose mask keeps the largest of the weights that it kept, down to this sparsity. A mask that is sparser
    already stays."""
    scores = state.weights[: len(state.mask)].abs()
    return replace(state, mask=nested_mask(state.mask, scores, num_kept(sparsity, len(scores))))


def train_client(
    model: FlatModel,
    method: Method,
    offer: Message,
    memory: Memory,
    clients: Clients,
    config: Config,
    t: int,
    client: int,
    done: Future | None = None,
) -> tuple[Message, Memory, LocalResult]:
    """One client's part of a round, from an offer as it arrived. Returns (reply as it travels, the client's new memory,
    result). `done`, if given, holds what clients have done together: `train_together`.

    Nothing is checked here: on a GPU that would wait for the device. The caller does, with `failures.collect`. Only
    what is coded has to be finite, and is waited for anyway.
    """
    offer, own = received(method, offer, model.weights.device, memory), methods_part(memory)
    plan, result = done.result().get(client, (None, None)) if done else (None, None)
    if result is None:
        plan = method.plan(offer, own, t)
        result = local_update(model, plan, clients.data, clients.train[client], config, t, client)
    if plan.test_leak:
        result = see_test_images(model, plan, result, clients.data, clients.test[client], config)
    reply, own = method.reply(result, own, t)
    if method.mask_cache:
        own = {**own, **held_part(memory, offer.mask)}
    if not is_coded(method):
        return reply, own, result
    result.check()
    answer, kept = answered(method, reply, offer, memory, t, client)
    return answer, {**own, **kept}, result


def train_together(
    model: FlatModel,
    method: Method,
    offers: Mapping[int, Message],
    memories: Mapping[int, Memory],
    clients: Clients,
    t: int,
) -> dict[int, tuple[LocalPlan, LocalResult]]:
    """The local updates of those clients of a round that can be trained together, with their plans, by client id."""
    plans = {}
    for client, offer in offers.items():
        with suppress(Exception):  # it fails again when it is the client's turn, and is told of there
            arrived = received(method, offer, model.weights.device, memories[client])
            plans[client] = method.plan(arrived, methods_part(memories[client]), t)
    results = clients.together(plans, clients.data, clients.train, t)
    return {client: (plans[client], result) for client, result in results.items()}


def record_of(
    new: ServerState, exchange: Exchange, skipped: Mapping[int, str], method: Method, config: Config
) -> RoundRecord:
    """What the round that led to `new` did."""
    state, replies, t = exchange.before, exchange.replies, exchange.before.round
    samples = samples_of(replies)
    loss = sum(float(replies[client].extras["loss"][0]) * count for client, count in samples.items())
    prunable = new.weights[: len(new.mask)]
    down, up = zip((exchange.offers, replies), *exchange.further, strict=True)
    return RoundRecord(
        round=t,
        train_loss=loss / sum(samples.values()),
        sparsity=1 - density(prunable * new.mask),
        lr=config.lr_at(t),
        penalty=method.penalty(t),
        up_bytes=sum(num_bytes(message) for messages in up for message in messages.values()),
        down_bytes=sum(num_bytes(message) for messages in down for message in messages.values()),
        regrown=int((new.mask & ~state.mask).count_nonzero()),
        pruning_error=pruning_error(prunable, new.mask),
        skipped=skipped,
        exchange=exchange,
    )


def pruning_error(prunable: Tensor, mask: Tensor) -> float:
    """||w - w*m||^2 / ||w||^2 over the prunable part of the dense average (docs/deviations.md D26), in [0, 1].

    NaN where nothing is pruned: there is no error to speak of.
    """
    if bool(mask.all()):
        return float("nan")
    squares = prunable.double().square_()
    return float((squares * ~mask).sum() / squares.sum())
