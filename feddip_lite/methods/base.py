"""`Method`: hooks with a plain default, masked SGD on a fixed mask and the weighted mean, in one exchange a round.

A method is a frozen dataclass: its fields are its hyper-parameters, its hooks are pure functions. Fields that
`Config` has too (target_sparsity, mask_interval, ...) get their value from there; the others are its
`method_options`. `presets` holds what a preset changes. How each method passes through the hooks: docs/design.md.
"""

import re
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..core.codecs import Codec, Fp32
from ..core.flat import FlatModel, Layout, kept_indices
from ..core.message import Message
from ..core.plan import LocalPlan, LocalResult
from ..core.state import Memory, ServerState

Replies = Mapping[int, Message]


@dataclass(frozen=True, kw_only=True)
class About:
    """A method's line in the methods table, in words; "-" is what nobody said.

    Attributes:
        title: as the literature spells it; a class that says nothing of itself has its own name, in words.
        family: "dense to dense", "dense to sparse" or "sparse to sparse"; "own" for a method of your own.
        mask_from, scope, regrows: what the mask is chosen from, over what, and whether pruned weights can come back.
        step, up, down: the client's step, and what travels.
        source: paper or published code.
        assumed: what had to be assumed where the source's details were not to be had; such a method is a
            reconstruction, and carries a dagger wherever it is shown.
    """

    title: str
    family: str = "own"
    mask_from: str = "-"
    scope: str = "-"
    regrows: bool = False
    step: str = "-"
    up: str = "-"
    down: str = "-"
    source: str = "-"
    assumed: str = ""


@dataclass(frozen=True, eq=False)
class Context:
    """What a few methods need of the run around them, beyond its layout.

    Attributes:
        scratch: `scratch()` is a new model on the run's device, `scratch(depth)` its first stages with a head of
            their own (`models.Prefix`); what they hold is arbitrary until loaded. Any thread may call it.
        depths: after how many stages the run's model can be cut; 0 = it cannot.
        images, labels: the reference samples that a method with the option `reference_per_class` has the server
            keep, in no client's shard: (k, C, H, W) float32, normalised, ordered by class, and (k,) int64.
    """

    scratch: Callable[..., FlatModel]
    depths: int
    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Method:
    """The default of every hook.

    Attributes:
        layout: of the model; all flat vectors refer to it.
        rounds, seed: of the run; every draw a method makes is addressed by (seed, purpose, round, client).
        context: for methods that need more of the run.
        down, up, up_pruned, up_feedback, mask_cache: how values and masks travel (`train/transport.py`); no hook needs
            to know. FedPAQ is `FedAvg(..., up=QSGD(8))`, Fed-EF `FedAvg(..., up=TopK(0.01), up_feedback="ef")`.
    """

    layout: Layout
    rounds: int
    seed: int
    context: Context | None = field(default=None, repr=False)
    down: Codec = field(default=Fp32(), kw_only=True)
    up: Codec = field(default=Fp32(), kw_only=True)
    up_pruned: Codec | None = field(default=None, kw_only=True)
    up_feedback: str = field(default="none", kw_only=True)
    mask_cache: bool = field(default=False, kw_only=True)

    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"paper": {}}
    about: ClassVar[About] = About(title="Method")

    def __init_subclass__(cls, **keywords) -> None:
        """A class that says nothing about itself is no longer what its parent is: it has its own name."""
        super().__init_subclass__(**keywords)
        if "about" not in vars(cls):
            cls.about = About(title=re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", cls.__name__))

    def penalty(self, t: int) -> float:
        """Strength of this method's regularisation in round t (0 = none); the column `penalty`."""
        return 0.0

    def start(self) -> tuple[Tensor, Memory]:
        """(mask (P,) bool on the CPU, server memory) before round 0. Default: dense, no memory."""
        return torch.ones(self.layout.prunable, dtype=torch.bool), {}

    def begin(self, state: ServerState) -> ServerState:
        """`state` before round 0, for methods whose first mask looks at the initial weights. Default: unchanged."""
        return state

    def offer(self, state: ServerState, t: int, client: int) -> Message:
        """What goes down to `client` in round t. Default: the sparse model with its mask; a dense one without."""
        mask = None if len(kept_indices(state.mask)) == self.layout.prunable else state.mask
        extras = {"buffers": state.buffers} if len(state.buffers) else {}
        return Message(self.layout.pack(state.weights, mask), mask, extras)

    def plan(self, offer: Message, memory: Memory, t: int) -> LocalPlan:
        """How the client trains, from what it was sent and what it holds. Default: masked SGD."""
        weights = self.layout.unpack(offer.values, offer.mask)
        return LocalPlan(weights, offer.mask, offer.extras.get("buffers"), project=True)

    def reply(self, result: LocalResult, memory: Memory, t: int) -> tuple[Message, Memory]:
        """(what goes up, what the client keeps). Default: the weights its mask keeps; the server knows that mask."""
        return message_of(result, self.layout.pack(result.weights, result.mask)), memory

    def accept(self, state: ServerState, reply: Message, t: int) -> None:
        """Refuse a reply to `state` that `merge` cannot use. Default: it needs weights, packed by the mask that came
        with them, else by the server's, or all n; and as many BatchNorm statistics as the server has.

        Raises:
            ValueError: one line that names the part. The client is to blame, and `merge` never sees the reply.
        """
        self.layout.check_packed(reply.values, state.mask if reply.mask is None else reply.mask)
        expect(reply, buffers=len(state.buffers))

    def inquires(self, t: int) -> bool:
        """Whether round t has exchanges after the first. Default: no."""
        return False

    def inquire(self, state: ServerState, replies: Replies, t: int) -> Generator[Message, Replies, Replies]:
        """Further exchanges of a round that `inquires`: yields what every client of `replies` is asked, is sent their
        answers by client id, and returns the replies as `merge` is to read them. A question with a mask asks for the
        weights that it keeps, one without for a mask. Should a client fail, it begins again with the others. Default:
        nothing is asked."""
        return replies
        yield  # makes it a generator

    def tell(self, question: Message, own: Message, t: int) -> Message:
        """A client's answer in round t. `own`: the dense weights (n,) that training left, and its plan's mask. Default:
        the weights that the question's mask keeps.

        Raises:
            ValueError: the question has no mask, and the method does not say what it means.
        """
        if question.mask is None:
            raise ValueError(f"the question has no mask, and {type(self).__name__} answers no other")
        return Message(own.values[: self.layout.prunable][question.mask])

    def merge(self, state: ServerState, replies: Replies, t: int) -> ServerState:
        """The state after round t, from `replies` by client id. Default: weighted means, same mask."""
        weights = self.mean_weights(state, replies)
        return replace(state, round=t + 1, weights=weights, buffers=mean_buffers(state, replies))

    def places(self, message: Message, mask: Tensor | None) -> slice | Tensor:
        """Where in w the values of an offer or a reply stand, in their order: an index of (n,) vectors. Default: where
        the mask (P,) keeps, the message's own or else `mask`, then all that is unprunable; n values are all of w.

        Raises:
            ValueError: as `accept` does of values.
        """
        mask = mask if message.mask is None else message.mask
        self.layout.check_packed(message.values, mask)
        if message.values.numel() == self.layout.size:
            return slice(None)
        unprunable = torch.arange(self.layout.prunable, self.layout.size, device=mask.device)
        return torch.cat([kept_indices(mask), unprunable])

    def mean_weights(self, state: ServerState, replies: Replies) -> Tensor:
        """sum_n rho_n w_n over the replies, rho_n = samples_n / sum of samples: float32 (n,), summed in float64.

        Each is packed by the mask that came with it, else by the server's; what a client's own mask prunes counts as
        0. Clients are taken in order of their ids, so the order of arrival never changes a bit.
        """
        ordered = (replies[client] for client in sorted(replies))
        vectors = (self.layout.unpack(r.values, state.mask if r.mask is None else r.mask) for r in ordered)
        return weighted_mean(vectors, replies)

    def remembered(self, state: ServerState, mean: Tensor) -> Tensor:
        """w + sum_n rho_n (w_n - w*m), (n,): what clients changed of what they were sent, added to the dense weights
        that the server kept; `mean` (n,) is that of their weights."""
        sent = self.layout.masked(state.weights, state.mask)
        return (state.weights.double() + (mean.double() - sent.double())).float()


def expect(reply: Message, **counts: int) -> None:
    """Refuse a reply that lacks one of these extras, or has another count of numbers in it; 0 = none is needed.

    Raises:
        ValueError: names the extra.
    """
    for name, count in counts.items():
        there = len(reply.extras.get(name, ()))
        if there != count:
            raise ValueError(f"the reply's {name}: {there} numbers; expected {count}")


def expect_mask(reply: Message) -> None:
    """Refuse a reply without a mask of its own. Raises ValueError."""
    if reply.mask is None:
        raise ValueError("the reply's mask: missing; expected the client's own")


def message_of(result: LocalResult, values: Tensor | None) -> Message:
    """A reply of `values` with what every reply carries, and the BatchNorm statistics."""
    extras = account_of(result)
    if len(result.buffers):
        extras["buffers"] = result.buffers
    return Message(values, None, extras)


def account_of(result: LocalResult) -> dict[str, Tensor]:
    """What every reply carries, weights or not: number of samples and loss."""
    return {"samples": torch.tensor([result.samples]), "loss": result.loss.view(1)}


def samples_of(replies: Replies) -> dict[int, int]:
    """Training samples behind each reply, in order of client ids."""
    return {client: int(replies[client].extras["samples"][0]) for client in sorted(replies)}


def mean_buffers(state: ServerState, replies: Replies) -> Tensor:
    """Weighted mean of the BatchNorm running means and variances, (b,); no statistics, no change (D14)."""
    if not len(state.buffers):
        return state.buffers
    return mean_of(replies, "buffers")


def first_of(replies: Replies) -> Replies:
    """The reply of the lowest client id alone: where a published code gives one client a say that others lack."""
    first = min(replies)
    return {first: replies[first]}


def mean_of(replies: Replies, name: str) -> Tensor:
    """The weighted mean of the extra `name` of every reply."""
    return weighted_mean((replies[client].extras[name] for client in sorted(replies)), replies)


def weighted_mean(vectors, replies: Replies) -> Tensor:
    """sum_n rho_n v_n of equal-length float32 vectors in order of client ids; one at a time, in float64.

    Raises:
        ValueError: vectors of unlike length.
    """
    samples = samples_of(replies)
    total, mean = sum(samples.values()), None
    for vector, count in zip(vectors, samples.values(), strict=True):
        term = vector.to(torch.float64, copy=True).mul_(count / total)
        if mean is not None and term.shape != mean.shape:  # a single number would be added to all
            raise ValueError(f"replies: {term.numel()} and {mean.numel()} numbers have no mean")
        mean = term if mean is None else mean.add_(term)
    return mean.float()
