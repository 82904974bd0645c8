"""What a run raises beside ValueError and OSError, and the exit status that each stands for."""

from collections.abc import Callable

FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130


class Diverged(ValueError):
    """A loss, a reply or a metric became NaN or infinite; the message names the last finite loss."""


class ClientFailure(RuntimeError):
    """A client failed and `on_client_failure` is "abort", or no client was left; names round, client and reason."""


class OutOfTime(Exception):
    """The time limit of a sweep has come; what was done is in the checkpoint."""


class Held(Exception):
    """Another process is computing this run."""


class Note(UserWarning):
    """Something that is allowed, and seldom meant."""


def is_divergence(error: BaseException | None) -> bool:
    """Whether `error`, or what caused it, is that a loss, a reply or a weight became NaN or infinite."""
    return error is not None and (isinstance(error, Diverged) or is_divergence(error.__cause__))


def guarded(work: Callable[[], int]) -> tuple[int, str]:
    """(exit status, one line that says what failed, or nothing): `work()`, or what its exception means."""
    try:
        return work(), ""
    except (ClientFailure, Diverged) as error:
        status, message = FAILED, error
    except (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        status, message = BAD_INPUT, error
    except OSError as error:
        status, message = FAILED, error
    except KeyboardInterrupt as error:
        status, message = INTERRUPTED, "; ".join(["interrupted", *getattr(error, "__notes__", ())])
    return status, " ".join(str(message).split())
