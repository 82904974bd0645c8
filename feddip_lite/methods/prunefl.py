"""PruneFL: keep the weights that promise the largest decrease of the loss per second of round time."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.schedules import sparsity_at
from ..core.settings import one_of, real, setting
from ..core.sparsity import kept_per_layer, layerwise_mask, num_kept
from .base import About, LocalPlan, LocalResult, Memory, Message, Method, Replies, expect, first_of, mean_of


@dataclass(frozen=True)
class PruneFL(Method):
    """PruneFL (Jiang et al. 2022): every `mask_interval` rounds, round 0 included, the set M of kept weights is chosen
    anew so that (sum over M of g_j^2) / (c + sum over M of t_j) is as large as possible, g_j the gradient at the
    masked weights and t_j the time that weight j costs a round. Published code jiangyuang/PruneFL
    `control/algorithm.py`, `bases/fl/simulation/adaptive.py`.

    Clients send the mean of g_j^2 over their local steps, all P of them. To choose from are the pruned weights and the
    smallest share of the kept ones in each layer; the rest stays. They enter by g_j^2 / t_j while that exceeds the
    ratio reached so far. The number kept is bounded from above by a density that falls linearly (the published
    options `max_density`, `target_density`) and from below by the target density, so that both meet at the end. The
    server adds the mean increment to its dense weights: what was pruned comes back with the value it had.

    Preset `repo` is the variant of FedDIP's authors (`prunefl.py`, `functions_new.py:prunefl_reconfig`): g_j^2 of one
    batch after training, not divided by time, any weight may go, at least as many kept as the cubic schedule says,
    the plain mean, and a choice in the last round of each interval rather than the first.

    Deviations: times are computed, not measured, or no run could be repeated. The initial pruning is that of round 0,
    by its ordinary cohort (published: many steps at one client, which is privileged; `first_mask_by`). Squared
    gradients are those of the one round that chooses (published: added up over all rounds since the last choice, P
    numbers that every client keeps; `squares_since`), and of prunable weights alone (published: of biases, too). What
    stays without question is a share of what the ceiling lets through, since otherwise a falling ceiling would leave
    no room for a choice.
    """

    about = About(
        title="PruneFL", family="dense to sparse", mask_from="squared gradient per time", scope="global",
        regrows=True, step="masked SGD", up="sparse, with squared gradients when a mask is chosen",
        down="sparse and mask", source="Jiang et al., TNNLS 2022; jiangyuang/PruneFL",
    )  # fmt: skip

    initial_sparsity: float = 0.5
    target_sparsity: float = 0.9
    mask_interval: int = 50
    rule: str = setting("paper", one_of("paper", "repo"), "how gradients decide, when, and how weights are averaged")
    first_mask_by: str = setting(
        "cohort", one_of("cohort", "client"), "whose gradients choose in round 0: the cohort's, or one client's"
    )
    squares_since: str = setting(
        "round", one_of("round", "choice"), "squared gradients since when: this round alone, or the last choice"
    )
    candidates: float = setting(
        0.3, real("[0, 1]"), "share of each layer's kept weights that may be pruned in round 0 (published: 0.3)"
    )
    halvings: float = setting(
        1.0, real("[0, inf)"), "how often that share is halved by the end (published: once in 10 000 of 10 001 rounds)"
    )
    ceiling_until: float = setting(
        1.0, real("[0, 1]"), "share of the rounds after which the ceiling is the target (published: all)"
    )
    seconds_per_flop: float = setting(
        6e-8, real("[0, inf)"), "round time per FLOP of one sample (assumed: 100 samples, three passes, 5 GFLOP/s)"
    )
    seconds_per_weight: float = setting(
        5.56e-6, real("[0, inf)"), "round time of sending one weight (published: 5.56e-6)"
    )
    seconds_fixed: float = setting(1.0, real("[0, inf)"), "round time c that no mask can save (assumed)")

    presets = {"paper": {}, "repo": {"mask_interval": 20, "rule": "repo"}}

    def chooses_mask(self, t: int) -> bool:
        """Whether the server chooses a new mask at the end of round t."""
        return t % self.mask_interval == (self.mask_interval - 1 if self.rule == "repo" else 0)

    def collects(self, t: int) -> bool:
        """Whether clients take squared gradients in round t."""
        return self.chooses_mask(t) or self.squares_since == "choice"

    def bounds(self, t: int) -> tuple[int, int]:
        """The smallest and the largest number of weights that a mask chosen in round t may keep."""
        prunable = self.layout.prunable
        if self.rule == "repo":
            sparsity = sparsity_at(t, self.initial_sparsity, self.target_sparsity, self.rounds)
            return num_kept(sparsity, prunable), prunable
        end = min(self.ceiling_until * self.rounds, (self.rounds - 1) // self.mask_interval * self.mask_interval)
        left = 1 - t / end if t < end else 0.0
        highest = self.target_sparsity + (self.initial_sparsity - self.target_sparsity) * left
        return num_kept(self.target_sparsity, prunable), num_kept(highest, prunable)

    def times(self, device: torch.device) -> Tensor:
        """t_j: what each prunable weight adds to the time of a round, in seconds; (P,) float64."""
        slots = self.layout.prunable_slots
        each = [2 * slot.uses * self.seconds_per_flop + self.seconds_per_weight for slot in slots]
        sizes = torch.tensor([slot.stop - slot.start for slot in slots])
        return torch.tensor(each, dtype=torch.float64).repeat_interleave(sizes).to(device)

    def plan(self, offer: Message, memory: Memory, t: int) -> LocalPlan:
        plan = super().plan(offer, memory, t)
        if not self.collects(t):
            return plan
        return replace(plan, final_gradient="batch") if self.rule == "repo" else replace(plan, squared_gradients=True)

    def reply(self, result: LocalResult, memory: Memory, t: int) -> tuple[Message, Memory]:
        reply, memory = super().reply(result, memory, t)
        if not self.collects(t):
            return reply, memory
        per_step = self.rule == "paper"
        squares = result.squared_gradients / len(result.losses) if per_step else result.gradient.square()
        squares = squares[: self.layout.prunable]
        if self.squares_since == "choice":
            squares, memory = self.added(squares, memory, t)
        return reply.plus(squared_gradients=squares) if self.chooses_mask(t) else reply, memory

    def added(self, squares: Tensor, memory: Memory, t: int) -> tuple[Tensor, Memory]:
        """`squares` (P,) of round t plus those that the client holds for the same choice, and what it holds then."""
        choice = next(u for u in range(t, t + self.mask_interval) if self.chooses_mask(u))
        if memory and int(memory["choice"][0]) == choice:
            squares = squares + memory["squares"]
        return squares, {"squares": squares, "choice": torch.tensor([choice])}

    def accept(self, state, reply: Message, t: int) -> None:
        super().accept(state, reply, t)
        if self.chooses_mask(t):
            expect(reply, squared_gradients=self.layout.prunable)

    def merge(self, state, replies: Replies, t: int):
        new = super().merge(state, replies, t)
        if self.rule == "paper":
            new = replace(new, weights=self.remembered(state, new.weights))
        if not self.chooses_mask(t):
            return new
        asked = first_of(replies) if t == 0 and self.first_mask_by == "client" else replies
        return replace(new, mask=self.best(new.weights, new.mask, mean_of(asked, "squared_gradients"), t))

    def best(self, weights: Tensor, mask: Tensor, squares: Tensor, t: int) -> Tensor:
        """The mask (P,) of round t: weights in order of their gain while it pays, within `bounds`."""
        lowest, highest = self.bounds(t)
        gains, times = squares.double(), self.times(squares.device)
        if self.rule == "repo":
            order, sure = gains.argsort(descending=True, stable=True), 0
            worth = gains[order]
        else:
            stays = self.unquestioned(weights, mask, highest, t)
            order = (gains / times).argsort(descending=True, stable=True)
            order = torch.cat([order[stays[order]], order[~stays[order]]])
            worth, sure = (gains / times)[order], int(stays.sum())
        reached = gains[order].cumsum(0) / (self.seconds_fixed + times[order].cumsum(0))
        start = max(sure, lowest, 1)
        pays = worth[start:] > reached[start - 1 : -1]  # more than the ratio reached before it
        count = start + int(pays.int().cumprod(0).sum())
        return torch.zeros_like(mask).index_fill_(0, order[: min(count, highest)], True)

    def unquestioned(self, weights: Tensor, mask: Tensor, highest: int, t: int) -> Tensor:
        """The kept weights that stay whatever their gradient: in each layer the largest, (P,) bool."""
        kept = kept_per_layer(self.layout, mask)
        share = 1 - self.candidates * 0.5 ** (self.halvings * t / self.rounds)
        share *= min(1, highest / max(1, sum(kept)))
        magnitudes = weights[: self.layout.prunable].abs().masked_fill(~mask, -1)
        return layerwise_mask(self.layout, magnitudes, [math.floor(share * count) for count in kept])
