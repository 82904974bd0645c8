"""The exchanges of a round after the first: a method asks clients for more before it merges (`Method.inquire`).

    until the method has asked enough:   question -> every client that is left   tell -> answer

Nobody trains again: a client answers from the weights that its training has left. Questions and answers are messages as
all others, and their bytes are charged. A client that fails here is one that failed in the round, so that nothing of it
is merged: then the method asks the others anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ..config import Config
from ..core.errors import Diverged
from ..core.flat import FlatModel
from ..core.message import Message
from ..core.plan import LocalResult
from ..core.state import EMPTY, Memory, ServerState
from ..methods.base import Method
from .failures import Collected, collect

if TYPE_CHECKING:
    from .round import Clients

Asked = tuple[Mapping[int, Message], Mapping[int, Message]]
"""An exchange: questions and answers, by client id."""


def inquired(
    found: Collected, clients: Clients, method: Method, state: ServerState, config: Config
) -> tuple[Collected, tuple[Asked, ...]]:
    """(what was found, with replies as `merge` reads them; the exchanges that took place, in their order).

    Raises:
        ClientFailure: as `failures.collect`.
    """
    exchanges = []
    while method.inquires(state.round):
        conversation, answers = method.inquire(state, found.replies, state.round), None
        try:
            lost = {}
            while not lost:
                questions = dict.fromkeys(found.replies, conversation.send(answers))
                jobs = clients.ask(method, questions, found.results, state.round)
                answers, lost = collect(jobs, clients.workers, state.round, config, checked_by(method, questions))
                exchanges.append((questions, answers))
        except StopIteration as end:
            return replace(found, replies=end.value), tuple(exchanges)
        found = found.without(lost)
    return found, tuple(exchanges)


def checked_by(method: Method, questions: Mapping[int, Message]) -> Callable[[int, tuple], Message]:
    """What `collect` takes of an outcome: its answer, refused unless it is what the question asks for."""

    def take(client: int, outcome: tuple[Message, Memory, LocalResult | None]) -> Message:
        answer, asked = outcome[0], questions[client].mask
        if asked is None and (answer.mask is None or len(answer.mask) != method.layout.prunable):
            raise ValueError(f"the answer has no mask of {method.layout.prunable} weights")
        if asked is not None and (answer.values is None or len(answer.values) != int(asked.count_nonzero())):
            raise ValueError(f"the answer's values: expected {int(asked.count_nonzero())} of them")
        if answer.values is not None and not bool(answer.values.isfinite().all()):
            raise Diverged("the answer's values: NaN or infinite")
        return answer

    return take


def own_of(result: LocalResult) -> Message:
    """What a client keeps until the end of the round, for questions."""
    return Message(result.weights, result.mask)


def tell_client(
    model: FlatModel, method: Method, question: Message, own: Message, t: int
) -> tuple[Message, Memory, LocalResult | None]:
    """One client's part of a further exchange: (its answer, no memory, no result)."""
    return method.tell(question, own, t), EMPTY, None
