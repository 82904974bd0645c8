"""What a run raises beside ValueError and OSError; each has a policy of its own."""

from __future__ import annotations


class Diverged(ValueError):
    """A loss, a reply or a metric became NaN or infinite; the message names the last finite loss."""


class ClientFailure(RuntimeError):
    """A client failed and `on_client_failure` is "abort", or no client was left; names round, client and reason."""


class OutOfTime(Exception):
    """The time limit of a sweep has come; what was done is in the checkpoint."""


class Held(Exception):
    """Another process is computing this run."""


def is_divergence(error: BaseException | None) -> bool:
    """Whether `error`, or what caused it, is that a loss, a reply or a weight became NaN or infinite."""
    return error is not None and (isinstance(error, Diverged) or is_divergence(error.__cause__))
