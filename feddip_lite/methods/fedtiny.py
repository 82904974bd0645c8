"""FedTiny: choose among coarsely pruned candidates by what clients measure, then refine the mask bit by bit."""

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.message import Message
from ..core.plan import LocalPlan, LocalResult
from ..core.schedules import cosine_at
from ..core.seeds import torch_generator
from ..core.settings import integer, real, setting
from ..core.sparsity import erk_densities, layerwise_mask, num_kept, topk_mask
from ..core.state import Memory
from .base import About, Method, Replies, account_of, expect, mean_of, samples_of
from .feddst import replaceable, strength, without_smallest


@dataclass(frozen=True)
class FedTiny(Method):
    """FedTiny (Huang et al. 2022, arXiv 2212.01977), a reconstruction from its abstract and from FedPruning's
    `fedtinyclean` and `fedtiny`.

    Module 1, adaptive BatchNorm selection: the server prunes the initial weights to the target in several ways. In
    round 0 clients measure the BatchNorm statistics of every candidate on their data; in round 1 they report the loss
    of every candidate under the averaged statistics, and the lowest mean loss wins. Nothing is trained. A model
    without BatchNorm needs the second round only. (FedPruning exchanges the affine parameters, which a pass without
    gradients leaves as they are, so its selection is inert.)

    Module 2, progressive pruning: every `mask_interval` rounds clients send, beside their weights, the largest
    gradients of pruned coordinates with their indices, k_l per layer, k_l a cosine-annealed share of the weights kept
    there. The server averages them, what a client does not send counting as 0, drops the k_l smallest weights of each
    layer and grows the k_l largest gradients; grown weights start at 0. Every mask keeps the same number of weights.
    """

    about = About(
        title="FedTiny", family="sparse to sparse", mask_from="loss of candidates, then magnitude and gradient",
        scope="layer", regrows=True, step="masked SGD",
        up="sparse, with top-k gradients when a mask is refined", down="sparse and mask",
        source="arXiv 2212.01977; FedPruning/FedPruning",
        assumed="how candidates differ (ERK densities scaled at random)",
    )  # fmt: skip

    target_sparsity: float = 0.9
    mask_interval: int = 10
    candidates: int = setting(5, integer(1, 8), "masks to choose from (published commands: 5)")
    spread: float = setting(0.5, real("[0, 1)"), "layer densities of candidates are scaled by 1 - spread .. 1 + spread")
    replaced: float = setting(
        0.2, real("[0, 1]"), "share of a layer's kept weights replaced at first (published default: 0.2)"
    )
    replace_until: float = setting(
        0.6, real("(0, 1]"), "share of the rounds after which the mask is fixed (published: 100 or 300 of 500 rounds)"
    )

    def begin(self, state):
        masks = [self.candidate(state.weights, number) for number in range(self.candidates)]
        code = sum(mask.to(torch.uint8) << number for number, mask in enumerate(masks))
        memory = {"candidates": code} if self.candidates > 1 else {}
        return replace(state, mask=masks[0], memory=memory)

    def candidate(self, weights: Tensor, number: int) -> Tensor:
        """Candidate mask (P,): the largest magnitudes of each layer, in numbers proportional to its ERK count, which
        for all but candidate 0 is scaled at random; exactly as many in all as the target sparsity says."""
        slots = self.layout.prunable_slots
        densities = torch.tensor(erk_densities([slot.shape for slot in slots], 1 - self.target_sparsity))
        if number:
            draw = torch.rand(len(slots), generator=torch_generator(self.seed, "candidate", number))
            densities *= 1 + self.spread * (2 * draw - 1)
        # A layer's weights queue up by magnitude, one per `1 / density`: one cut through all queues gives the counts.
        places = []
        for slot, density in zip(slots, densities.tolist(), strict=True):
            order = weights[slot.start : slot.stop].abs().argsort(descending=True, stable=True)
            place = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
            places.append((place.double() + 0.5) / (density * len(order)))
        return topk_mask(-torch.cat(places), num_kept(self.target_sparsity, self.layout.prunable))

    def share(self, t: int) -> float:
        """Share of each layer's kept weights that is replaced at the end of round t; 0 = the mask stays."""
        peak = self.replaced if t > 0 and t % self.mask_interval == 0 else 0.0
        return cosine_at(t, peak, self.replace_until * self.rounds)

    def offer(self, state, t: int, client: int) -> Message:
        if "candidates" not in state.memory:
            return super().offer(state, t, client)
        # The weights that any candidate keeps, once, with a byte each that says which: bit c for candidate c.
        code = state.memory["candidates"]
        offer = super().offer(replace(state, mask=code > 0), t, client)
        return offer.plus(**{**state.memory, "candidates": code[code > 0]})

    def plan(self, offer: Message, memory: Memory, t: int) -> LocalPlan:
        plan = super().plan(offer, memory, t)
        if "candidates" in offer.extras:
            return self.selection(offer, plan)
        return replace(plan, final_gradient="batch") if plan.mask is not None and self.share(t) else plan

    def selection(self, offer: Message, plan: LocalPlan) -> LocalPlan:
        """Every candidate in turn: refresh its BatchNorm statistics, or measure its loss under the averaged ones."""
        code = offer.extras["candidates"]
        if plan.mask is not None:
            code = code.new_zeros(self.layout.prunable).masked_scatter_(plan.mask, code)
        buffers, mode, epochs = [plan.buffers] * self.candidates, "score", 1
        if "statistics" in offer.extras:
            buffers = offer.extras["statistics"].chunk(self.candidates)
        elif self.layout.buffer_size:
            mode, epochs = "refresh", None

        def measure(number: int) -> LocalPlan:
            mask = bit(code, number)
            weights = self.layout.masked(plan.weights, mask)
            then = None if number + 1 == self.candidates else lambda result: measure(number + 1)
            return LocalPlan(weights, mask, buffers[number], mode=mode, epochs=epochs, then=then)

        return measure(0)

    def reply(self, result: LocalResult, memory: Memory, t: int) -> tuple[Message, Memory]:
        if result.parts:
            return self.measured(result, t), memory
        reply, memory = super().reply(result, memory, t)
        if result.gradient is None:
            return reply, memory
        count = replaceable(self.layout, result.mask, self.share(t))
        largest = layerwise_mask(self.layout, strength(result.gradient, ~result.mask), count)
        indices = largest.nonzero().squeeze(1)
        return reply.plus(indices=indices.int(), gradients=result.gradient[indices]), memory

    def measured(self, result: LocalResult, t: int) -> Message:
        """What a client reports of the candidates: their BatchNorm statistics in round 0, if any; else their losses."""
        if t == 0 and self.layout.buffer_size:
            found = {"statistics": torch.cat([part.buffers for part in result.parts])}
        else:
            found = {"losses": torch.stack([part.loss for part in result.parts])}
        return Message(None, None, account_of(result) | found)

    def accept(self, state, reply: Message, t: int) -> None:
        if "candidates" in state.memory:
            size = self.layout.buffer_size
            wanted = {"statistics": self.candidates * size} if t == 0 and size else {"losses": self.candidates}
            return expect(reply, **wanted)
        super().accept(state, reply, t)
        if self.share(t) and not state.mask.all():
            count = sum(replaceable(self.layout, state.mask, self.share(t)))
            expect(reply, indices=count, gradients=count)
            indices = reply.extras["indices"]
            if count and not 0 <= int(indices.min()) <= int(indices.max()) < self.layout.prunable:
                raise ValueError(f"the reply's indices: expected integers in [0, {self.layout.prunable - 1}]")

    def merge(self, state, replies: Replies, t: int):
        ordered = {client: replies[client].extras for client in sorted(replies)}
        found = next(iter(ordered.values()))
        if "statistics" in found:
            mean = mean_of(replies, "statistics")
            return replace(state, round=t + 1, memory={**state.memory, "statistics": mean})
        if "losses" in found:
            return self.selected(state, int(mean_of(replies, "losses").argmin()))
        new = super().merge(state, replies, t)
        if "gradients" not in found:
            return new
        count = replaceable(self.layout, state.mask, self.share(t))
        kept = without_smallest(self.layout, state.mask, new.weights, count)
        gradient = mean_of_sparse(ordered.values(), samples_of(replies).values(), self.layout.prunable)
        return replace(new, mask=kept | layerwise_mask(self.layout, strength(gradient, ~state.mask), count))

    def selected(self, state, best: int):
        """`state` after the selection: the mask of candidate `best`, with its statistics; candidates are forgotten."""
        mask = bit(state.memory["candidates"], best)
        buffers = state.buffers
        if "statistics" in state.memory:
            buffers = state.memory["statistics"].chunk(self.candidates)[best].clone()
        return replace(state, round=state.round + 1, mask=mask, buffers=buffers, memory={})


def bit(code: Tensor, number: int) -> Tensor:
    """Whether bit `number` of each entry of `code` is set: the mask (P,) of one candidate."""
    return code.bitwise_and(1 << number) > 0


def mean_of_sparse(sent: Collection[Memory], samples: Collection[int], size: int) -> Tensor:
    """The weighted mean (size,) float64 of vectors sent as `indices` and `gradients`; what was not sent counts as 0."""
    total = next(iter(sent))["gradients"].new_zeros(size, dtype=torch.float64)
    for extras, count in zip(sent, samples, strict=True):
        total.index_add_(0, extras["indices"].long(), extras["gradients"].double(), alpha=count / sum(samples))
    return total
