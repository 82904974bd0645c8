"""Clients that fail: what is refused, who is to blame, and what `on_client_failure` makes of it.

Whatever goes wrong, the server's state is a value that nobody has touched: a round is merged whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from ..config import Config
from ..core.errors import ClientFailure, Diverged
from ..core.message import Message
from ..core.plan import LocalResult
from ..core.state import ServerState
from ..methods.registry import Method
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


def collect(futures: Mapping[int, Job], workers: Workers, state: ServerState, config: Config):
    """Wait for all clients. Returns (replies, memories, skipped), each by client id in ascending order.

    Raises:
        ClientFailure: under "abort", of the first client that failed, when none is running any more; and if every one
            diverged.
    """
    replies, memories, skipped, errors = {}, {}, {}, []
    # A client looks at the clock itself, between batches; only one that does not even do that is given up.
    limit = None if config.client_timeout is None else 2 * config.client_timeout
    for client, future in futures.items():
        try:
            reply, memory, result = workers.result(future, limit)
            check_client(reply, result, len(state.mask))
        except (Exception, SystemExit) as error:  # any failure of a client is the policy's to judge
            if config.on_client_failure == "abort":
                for other in futures.values():
                    other.cancel()
                for other in futures.values():
                    with suppress(Exception, SystemExit):
                        workers.result(other, limit)
            _judge(client, error, skipped, config, state.round)
            errors.append(error)
        else:
            replies[client] = reply
            if memory:
                memories[client] = memory
    if not replies and all(isinstance(error, Diverged) for error in errors):
        last = f"client {client}: {skipped[client]}"
        raise ClientFailure(f"round {state.round}: every client failed; {last}") from errors[-1]
    return replies, memories, skipped


def _judge(client: int, error: BaseException, skipped: dict[int, str], config: Config, t: int) -> None:
    """Note a client's failure under "skip", raise it under "abort"."""
    reason = f"{type(error).__name__}: {error}"
    if config.on_client_failure == "abort":
        raise ClientFailure(f"round {t}, client {client}: {reason}") from error
    skipped[client] = reason


def merge(method: Method, state: ServerState, replies: dict[int, Message], skipped: dict[int, str], config: Config):
    """(the merged state, the replies that are in it).

    What a reply must look like only its method knows. So if the replies cannot be merged, those that cannot be merged
    on their own either are their clients' failures, and the rest is merged without them.
    """
    t = state.round
    if not replies:
        client, reason = next(reversed(skipped.items()))
        raise ClientFailure(f"round {t}: every client failed; client {client}: {reason}")
    try:
        return _merged(method, state, replies), replies
    except Exception:
        left = {}
        for client, reply in replies.items():
            try:
                _merged(method, state, {client: reply})
            except Exception as error:
                _judge(client, error, skipped, config, t)
            else:
                left[client] = reply
        if len(left) == len(replies):  # nobody's fault alone
            raise
    return merge(method, state, left, skipped, config)


def _merged(method: Method, state: ServerState, replies: Mapping[int, Message]) -> ServerState:
    new = method.merge(state, replies, state.round)
    for name in ("weights", "buffers", "mask"):
        before, after = getattr(state, name), getattr(new, name)
        if (after.shape, after.dtype) != (before.shape, before.dtype):
            kinds = [f"{part.dtype} {tuple(part.shape)}" for part in (before, after)]
            raise ValueError(f"the reply would make the {name} {kinds[1]}; they are {kinds[0]}")
    return new
