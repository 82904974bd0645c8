"""Clients that fail: what is refused, and what `on_client_failure` makes of it.

Whatever goes wrong, the server's state is a value that nobody has touched: a round is merged whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from ..config import Config
from ..core.errors import ClientFailure, Diverged
from ..core.message import Message
from ..core.plan import LocalResult
from ..core.state import Memory, ServerState
from ..methods.base import Method
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


def collect(
    jobs: Mapping[int, Job], workers: Workers, method: Method, state: ServerState, config: Config
) -> tuple[dict[int, Message], dict[int, Memory], dict[int, LocalResult], dict[int, str]]:
    """Wait for all clients. Returns (replies, memories, results, skipped), each by client id in ascending order.

    A reply is looked at as it comes, by `check_client` and by the method's own `accept`: what is here can be merged.

    Raises:
        ClientFailure: under "abort", of the first client that failed, when none is running any more; and if every one
            failed.
    """
    replies, memories, results, skipped, errors = {}, {}, {}, {}, []
    # A client looks at the clock itself, between batches; only one that does not even do that is given up.
    limit = None if config.client_timeout is None else 2 * config.client_timeout
    for client, job in jobs.items():
        try:
            reply, memory, result = workers.result(job, limit)
            check_client(reply, result, len(state.mask))
            method.accept(state, reply, state.round)
        except (Exception, SystemExit) as error:  # any failure of a client is the policy's to judge
            reason = f"{type(error).__name__}: {error}"
            if config.on_client_failure == "abort":
                _end(jobs, workers, limit)
                raise ClientFailure(f"round {state.round}, client {client}: {reason}") from error
            skipped[client] = reason
            errors.append(error)
        else:
            replies[client], results[client] = reply, result
            if memory:
                memories[client] = memory
    if not replies:
        cause = errors[-1] if all(isinstance(error, Diverged) for error in errors) else None
        client, reason = next(reversed(skipped.items()))
        raise ClientFailure(f"round {state.round}: every client failed; client {client}: {reason}") from cause
    return replies, memories, results, skipped


def _end(jobs: Mapping[int, Job], workers: Workers, limit: float | None) -> None:
    """Drop the jobs that have not begun, and wait for the others."""
    for job in jobs.values():
        job.cancel()
    for job in jobs.values():
        with suppress(Exception, SystemExit):
            workers.result(job, limit)
