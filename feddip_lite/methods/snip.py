"""SNIP: one mask before training, by connection sensitivity |w * dloss/dw|."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.seeds import derive
from ..core.settings import one_of, setting
from ..core.sparsity import num_kept, topk_mask
from .base import About, LocalPlan, LocalResult, Memory, Message, Method, Replies, account_of, expect, first_of, mean_of


@dataclass(frozen=True)
class SNIP(Method):
    """Round 0 only scores: each client of its ordinary cohort takes one gradient and sends
    |w*g| over its sum, P numbers; the server keeps the top of the weighted mean, globally, and leaves the weights
    alone. From round 1 on masked SGD on that mask.

    Scores are taken at weights drawn anew (Xavier, normal) for scoring only, from a seed in the download: both
    published codes score at variance-scaled weights that training does not start from. Deviations from the paper: one
    batch per client instead of one; from the published code: client 0 does not score alone (`scored_by="client"`: the
    first of the cohort does, in the same messages), cross-entropy instead of `nll_loss` of raw logits,
    ResNet's shortcuts stay dense, the round that scores trains nothing.
    Source: Lee et al., ICLR 2019, namhoonlee/snip-public `model.py`; published FedDIP code
    `functions_new.py:SNIP_modified`, `snip.py`.
    """

    about = About(
        title="SNIP", family="sparse to sparse", mask_from="|w*g| before training", scope="global",
        step="masked SGD", up="scores, then w*m", down="w, then w*m and m",
        source="Lee et al., ICLR 2019; EricLoong/feddip",
    )  # fmt: skip

    target_sparsity: float = 0.9
    scored_weights: str = setting("xavier", one_of("xavier", "initial"), "weights at which clients score")
    scored_data: str = setting("batch", one_of("batch", "epoch"), "what they score on: one batch, or all they have")
    scored_by: str = setting("cohort", one_of("cohort", "client"), "whose scores count: the cohort's, or one client's")

    def offer(self, state, t: int, client: int) -> Message:
        offer = super().offer(state, t, client)
        if t > 0 or self.scored_weights != "xavier":
            return offer
        return offer.plus(weights_seed=torch.tensor([derive(self.seed, "snip")]))

    def plan(self, offer: Message, memory: Memory, t: int) -> LocalPlan:
        plan = super().plan(offer, memory, t)
        if t > 0:
            return plan
        if "weights_seed" in offer.extras:
            plan = replace(plan, weights=self.redrawn(plan.weights, int(offer.extras["weights_seed"][0])))
        return replace(plan, epochs=0, final_gradient=self.scored_data)

    def redrawn(self, weights: Tensor, seed: int) -> Tensor:
        """`weights` (n,) with the prunable ones drawn anew: normal, variance 2 / (fan in + fan out)."""
        weights, draw = weights.clone(), torch.Generator().manual_seed(seed)
        for slot in self.layout.prunable_slots:
            fresh = torch.nn.init.xavier_normal_(torch.empty(slot.shape), generator=draw)
            slot.of(weights).copy_(fresh)
        return weights

    def reply(self, result: LocalResult, memory: Memory, t: int) -> tuple[Message, Memory]:
        if t > 0:
            return super().reply(result, memory, t)
        scores = (result.weights * result.gradient)[: self.layout.prunable].abs()
        scores /= scores.sum().clamp_min(torch.finfo(scores.dtype).tiny)
        return Message(None, None, {**account_of(result), "scores": scores}), memory

    def accept(self, state, reply: Message, t: int) -> None:
        if t > 0:
            return super().accept(state, reply, t)
        expect(reply, scores=self.layout.prunable)

    def merge(self, state, replies: Replies, t: int):
        if t > 0:
            return super().merge(state, replies, t)
        scorers = first_of(replies) if self.scored_by == "client" else replies
        mask = topk_mask(mean_of(scorers, "scores"), num_kept(self.target_sparsity, self.layout.prunable))
        return replace(state, round=1, mask=mask)
