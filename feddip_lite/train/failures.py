"""Clients that fail: what is refused, and what `on_client_failure` makes of it.

Whatever goes wrong, the server's state is a value that nobody has touched: a round is merged whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import Tensor

from ..config import Config
from ..core.errors import ClientFailure, Diverged
from ..core.message import Message
from ..core.plan import LocalResult
from ..core.state import Memory, ServerState
from ..methods.base import Method
from .transport import taken
from .workers import Job, Workers


def check_client(reply: Message, result: LocalResult, prunable: int) -> None:
    """Refuse what must not be merged.

    Raises:
        Diverged: a loss, a weight, or a value of the reply is NaN or infinite.
        ValueError: no message, a mask of other than `prunable` weights, no loss, or a claim to other samples than were
            trained on, which are its weight in the mean.
    """
    result.check()
    if not isinstance(reply, Message):
        raise ValueError(f"the reply is a {type(reply).__name__}; expected a Message")
    for name in ("samples", "loss"):
        if name not in reply.extras or len(reply.extras[name]) != 1:
            raise ValueError(f"the reply's {name}: missing; expected one number")
    for name, part in {"values": reply.values, **reply.extras}.items():
        if part is not None and part.is_floating_point() and not bool(part.isfinite().all()):
            raise Diverged(f"the reply's {name}: NaN or infinite values; last finite loss: {float(result.loss):.4g}")
    if reply.mask is not None and len(reply.mask) != prunable:
        raise ValueError(f"the reply's mask: {len(reply.mask)} weights; expected {prunable}")
    if (claimed := reply.extras["samples"].tolist()) != [result.samples]:
        raise ValueError(f"the reply's samples: {claimed} is not valid; expected [{result.samples}]")


Taken = TypeVar("Taken")


@dataclass(frozen=True)
class Collected:
    """What came of a cohort, by client id in ascending order: replies as they travelled (`answers`) and as their method
    reads them, `transport.taken`'s estimates where there are any, and why clients were skipped."""

    answers: dict[int, Message] = field(default_factory=dict)
    replies: dict[int, Message] = field(default_factory=dict)
    memories: dict[int, Memory] = field(default_factory=dict)
    estimates: dict[int, Tensor] = field(default_factory=dict)
    results: dict[int, LocalResult] = field(default_factory=dict)
    skipped: dict[int, str] = field(default_factory=dict)

    def without(self, lost: Mapping[int, str]) -> Collected:
        """The same as if these clients had failed, for these reasons, before they replied."""
        parts = (self.answers, self.replies, self.memories, self.estimates, self.results)
        left = ({client: part[client] for client in part if client not in lost} for part in parts)
        return Collected(*left, {**self.skipped, **lost})


def collect_replies(
    jobs: Mapping[int, Job],
    workers: Workers,
    method: Method,
    offers: Mapping[int, Message],
    state: ServerState,
    config: Config,
) -> Collected:
    """Wait for all clients, to whom the method made these offers.

    A reply is looked at as it comes, by `check_client` and by the method's own `accept`: what is here can be merged.

    Raises:
        ClientFailure: as `collect`.
    """
    found = Collected()

    def take(client: int, outcome: tuple[Message, Memory, LocalResult]) -> None:
        answer, memory, result = outcome
        check_client(answer, result, len(state.mask))
        reply, estimate = taken(method, answer, offers[client], state.estimates.get(client))
        method.accept(state, reply, state.round)
        found.answers[client], found.replies[client], found.results[client] = answer, reply, result
        if memory:
            found.memories[client] = memory
        if estimate is not None:
            found.estimates[client] = estimate

    return replace(found, skipped=collect(jobs, workers, state.round, config, take)[1])


def collect(
    jobs: Mapping[int, Job], workers: Workers, t: int, config: Config, take: Callable[[int, tuple], Taken]
) -> tuple[dict[int, Taken], dict[int, str]]:
    """Wait for all clients, and `take(client, outcome)` what each has made, as it comes. Returns what that gave, and
    why clients were skipped: whatever went wrong, there or in `take`, is the policy's to judge.

    Raises:
        ClientFailure: under "abort", of the first client that failed, when none is running any more; and if every one
            failed.
    """
    found, skipped, errors = {}, {}, []
    limit = limit_of(config)
    for client, job in jobs.items():
        try:
            found[client] = take(client, workers.result(job, limit))
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {error}"
            if config.on_client_failure == "abort":
                _end(jobs, workers, limit)
                raise ClientFailure(f"round {t}, client {client}: {reason}") from error
            skipped[client] = reason
            errors.append(error)
    if not found:
        cause = errors[-1] if all(isinstance(error, Diverged) for error in errors) else None
        client, reason = next(reversed(skipped.items()))
        raise ClientFailure(f"round {t}: every client failed; client {client}: {reason}") from cause
    return found, skipped


def limit_of(config: Config) -> float | None:
    """Seconds after which a client is given up. It looks at the clock itself, between batches; only one that does not
    even do that comes so far."""
    return None if config.client_timeout is None else 2 * config.client_timeout


def _end(jobs: Mapping[int, Job], workers: Workers, limit: float | None) -> None:
    """Drop the jobs that have not begun, and wait for the others."""
    for job in jobs.values():
        job.cancel()
    for job in jobs.values():
        with suppress(Exception, SystemExit):
            workers.result(job, limit)
