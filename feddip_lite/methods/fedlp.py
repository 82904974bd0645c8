"""FedLP: layers are dropped at random on their way up, or small clients hold only the first of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from ..core.flat import Layout, Slot
from ..core.seeds import numpy_generator, torch_generator
from ..core.settings import integer, one_of, real, setting
from .base import About, LocalPlan, LocalResult, Memory, Message, Method, Replies, expect, message_of

PREFERRED = 0.6  # share of the clients that have the preferred complexity (published code: models_complexity.py)


@dataclass(frozen=True)
class FedLP(Method):
    """Federated layer pruning: nothing is sparse, what is saved are tensors that do not travel.

    `homo`: every client trains the whole model, and each tensor of its reply, BatchNorm statistics included, goes up
    with probability `keep_probability`; the reply says which were `dropped`.

    `hetero`: a client of complexity c holds the model's first c stages and a linear head of its own, which stays in
    its memory; one of the highest complexity holds the whole model. Only what is shared travels, both ways. LeNet-5
    has complexities 1 to 3: after conv1, after conv2, whole.

    Either way the server takes the unweighted mean of the copies that came of each tensor, and keeps the old one
    where none came. Accuracy is that of the whole global model, as for every method, though under `hetero` few train
    its last layers.

    Deviations: stages are those of the models here, a private head is a single layer, and heads of one complexity
    start alike. Heads are kept from one participation to the next; the published code throws the trained ones away.
    Optimiser and data as for every method.
    Source: Zhuzzq/FedLP `main_fed_cplx.py`, `main_fed_hetero.py`, `models/Fed.py`, `models_complexity.py`.
    """

    about = About(
        title="FedLP", family="dense to dense", step="dense; hetero: first stages and an own head",
        up="tensors drawn; hetero: first stages", down="dense w; hetero: first stages", source="Zhuzzq/FedLP",
    )  # fmt: skip

    variant: str = setting("homo", one_of("homo", "hetero"), "tensors dropped at random, or clients of unlike size")
    keep_probability: float = setting(
        0.5, real("[0, 1]"), "homo: that a tensor goes up (published results: 0.1 to 0.7; code: `up_droprate`)"
    )
    preference: int = setting(0, integer(0), "hetero: complexity of 60 % of the clients; 0 = all equally likely")

    def __post_init__(self):
        if self.variant == "homo":
            return
        depths = self.context.depths if self.context else 0
        if not depths:
            raise ValueError("variant: 'hetero' is not valid with a model that names no stages to cut it after")
        integer(0, depths + 1).require("preference", self.preference, "this model's complexities; 0 = all alike")

    @cached_property
    def layouts(self) -> tuple[Layout, ...]:
        """Of the models of complexity 1, 2, ... below the whole."""
        depths = self.context.depths if self.variant == "hetero" else 0
        return tuple(self.context.scratch(depth).layout for depth in range(1, depths + 1))

    @cached_property
    def tensors(self) -> tuple[Slot, ...]:
        """What can travel: weights, then BatchNorm statistics."""
        return self.layout.slots + self.layout.buffer_slots

    @cached_property
    def parts(self) -> tuple[list[bool], ...]:
        """For each complexity, the whole at last: which of `tensors` its clients share."""
        names = [{slot.name for slot in own.slots + own.buffer_slots} for own in self.layouts]
        cut = [[f"trunk.{slot.name}" in own for slot in self.tensors] for own in names]
        return *cut, [True] * len(self.tensors)

    def complexity(self, client: int) -> int:
        """1, 2, ...; the highest is the whole model. A property of the client, drawn once and for all."""
        count = len(self.parts)
        others = (1 - PREFERRED) / (count - 1)
        share = [PREFERRED if c + 1 == self.preference else others for c in range(count)] if self.preference else None
        return 1 + int(numpy_generator(self.seed, "complexity", client).choice(count, p=share))

    def gathered(self, weights: Tensor, buffers: Tensor, kept: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """(values, statistics) of those of `tensors` that are `kept`."""
        places = coordinates(self.tensors, kept)
        return weights[places[: self.layout.size]], buffers[places[self.layout.size :]]

    def offer(self, state, t: int, client: int) -> Message:
        if self.variant == "homo":
            return super().offer(state, t, client)
        kept = self.parts[self.complexity(client) - 1]
        values, buffers = self.gathered(state.weights, state.buffers, kept)
        return Message(values, None, {"buffers": buffers} if len(buffers) else {})

    def plan(self, offer: Message, memory: Memory, t: int) -> LocalPlan:
        if self.variant == "homo":
            return super().plan(offer, memory, t)
        complexity = 1 + self.parts.index(self.part_of(offer))
        if complexity == len(self.parts):
            return super().plan(offer, memory, t)
        model = self.context.scratch(complexity)
        in_head = head_of(model.layout)
        weights = torch.empty_like(model.weights)
        weights[in_head] = memory["head"] if memory else self.first_head(complexity).to(weights.device)
        weights[~in_head] = offer.values
        return LocalPlan(weights, None, offer.extras.get("buffers"), model=model)

    def first_head(self, complexity: int) -> Tensor:
        """A new head's weight and bias, one after the other, uniform in +-1/sqrt(features): PyTorch's default."""
        weight, bias = (slot.shape for slot in self.layouts[complexity - 1].slots if slot.name.startswith("head."))
        draw = torch.rand(prod(weight) + prod(bias), generator=torch_generator(self.seed, "head", complexity))
        return (2 * draw - 1) / weight[1] ** 0.5

    def reply(self, result: LocalResult, memory: Memory, t: int) -> tuple[Message, Memory]:
        if self.variant == "homo":
            return self.thinned(result, t), memory
        complexity = self.complexity(result.client)
        if complexity == len(self.parts):
            return message_of(result, result.weights), memory
        in_head = head_of(self.layouts[complexity - 1])
        return message_of(result, result.weights[~in_head]), {"head": result.weights[in_head]}

    def thinned(self, result: LocalResult, t: int) -> Message:
        """The reply of the whole model without the tensors drawn to be dropped."""
        draw = torch.rand(len(self.tensors), generator=torch_generator(self.seed, "drop", t, result.client))
        dropped = draw >= self.keep_probability
        values, buffers = self.gathered(result.weights, result.buffers, (~dropped).tolist())
        message = message_of(replace(result, buffers=buffers), values)
        return message.plus(dropped=dropped) if dropped.any() else message

    def parts_of(self, message: Message) -> Sequence[Sequence[bool]]:
        """Which of `tensors` a message may hold: all that were not dropped, or those that some complexity shares."""
        if "dropped" in message.extras:
            return [(~message.extras["dropped"]).tolist()]
        return self.parts

    def part_of(self, message: Message) -> Sequence[bool]:
        """Which of `tensors` a message holds: the part that has its number of values. Raises ValueError: none has."""
        for kept in self.parts_of(message):
            if self.sizes(kept)[0] == len(message.values):
                return kept
        raise ValueError(f"values: {len(message.values)} of them; expected those of whole tensors")

    def places(self, message: Message, mask: Tensor | None) -> Tensor:
        weights = coordinates(self.tensors, self.part_of(message))[: self.layout.size]
        return weights.nonzero().view(-1).to(message.values.device)

    def sizes(self, kept: Sequence[bool]) -> tuple[int, int]:
        """The numbers of (values, statistics) in those of `tensors` that are `kept`."""
        count = len(self.layout.slots)
        own = [keep * (slot.stop - slot.start) for slot, keep in zip(self.tensors, kept, strict=True)]
        return sum(own[:count]), sum(own[count:])

    def accept(self, state, reply: Message, t: int) -> None:
        if "dropped" in reply.extras:
            expect(reply, dropped=len(self.tensors))
        sizes = [self.sizes(kept) for kept in self.parts_of(reply)]
        found = None if reply.values is None else len(reply.values), len(reply.extras.get("buffers", ()))
        if found not in sizes:
            shown = " or ".join(f"{values} and {buffers}" for values, buffers in sizes)
            raise ValueError(f"values: {found[0]} of them, and {found[1]} buffers; expected {shown}")

    def merge(self, state, replies: Replies, t: int):
        old = torch.cat([state.weights, state.buffers])
        total, copies = torch.zeros_like(old, dtype=torch.float64), torch.zeros_like(old, dtype=torch.int64)
        for client in sorted(replies):
            reply = replies[client]
            places = coordinates(self.tensors, self.part_of(reply)).to(old.device)
            total[places] += torch.cat([reply.values, reply.extras.get("buffers", reply.values[:0])])
            copies += places
        new = torch.where(copies > 0, (total / copies).float(), old)
        weights, buffers = new.split([self.layout.size, self.layout.buffer_size])
        return replace(state, round=t + 1, weights=weights, buffers=buffers)


def coordinates(slots: Sequence[Slot], kept: Sequence[bool]) -> Tensor:
    """Where the kept ones of these tensors lie, all one after the other in one vector: bool, as long as that."""
    return torch.tensor(kept).repeat_interleave(torch.tensor([slot.stop - slot.start for slot in slots]))


def head_of(layout: Layout) -> Tensor:
    """Where the head's weights lie in those of a cut model: (n,) bool."""
    return coordinates(layout.slots, [slot.name.startswith("head.") for slot in layout.slots])
