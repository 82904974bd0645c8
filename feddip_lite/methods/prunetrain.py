"""PruneTrain: group lasso from the start drives groups of weights towards zero, and the weakest are removed."""

from dataclasses import dataclass, replace
from math import log, sqrt

import torch
from torch import Tensor

from ..core.flat import Slot
from ..core.schedules import sparsity_at
from ..core.settings import flag, real, setting
from ..core.sparsity import nested_mask, num_kept, tie_broken, topk_mask
from .base import About, LocalPlan, LocalResult, Memory, Message, Method, Replies, expect_mask


@dataclass(frozen=True)
class PruneTrain(Method):
    """SGD under lambda * sum of ||group||_2 with a constant lambda; every `mask_interval` rounds the server prunes.

    `paper` (structured): a group is an output channel or neuron; in the last layer, whose outputs are classes, an
    input. Clients train under the mask; removed groups never return. The original removes what has come near zero
    and ends at the sparsity that lambda leads to. Here the target must be met: groups go in order of their root mean
    square until the cubic schedule's count is reached, which the last event does exactly; the last group to go is cut
    by magnitude, and the strongest of each layer goes last. The original groups inputs of all layers as well
    (`input_groups`: under the penalty; what is removed are the same groups).
    The penalty ratio is ours: 0.2, the original's, drives LeNet-5 under plain SGD to zero before it
    learns; 0.02 did best of eight values from 0 to 0.2 on held-out training digits (three seeds, half width), by less
    than the seeds differ.

    `repo` (not structured): a group is a tensor, first and last layer left out. Clients prune what they get to s_t,
    train it densely, and prune it again before they reply, masks included; the server prunes the mean, every round.
    The last two prunings spare first and last layer while those are less than half of what is kept. The count is
    met over all layers; in the published code only over the others, which are then less sparse than s_t says.
    Source: Lym et al., SC 2019; published FedDIP code `prunetrain.py`, `client.py:train_model_prunetrain`.
    """

    about = About(
        title="PruneTrain", family="dense to sparse", mask_from="norm of channels in the average",
        scope="global", step="masked SGD under group lasso", up="w*m", down="w*m and m",
        source="Lym et al., SC 2019 (arXiv 1901.09290)",
        assumed="channels removed by rank to the common target, on the cubic schedule every R = 5 rounds; "
        "lambda from a penalty ratio of 0.02 (chosen on held-out digits); preset repo (magnitude, dense steps, "
        "regrows) needs none",
    )  # fmt: skip

    initial_sparsity: float = 0.0
    target_sparsity: float = 0.9
    mask_interval: int = 5
    structured: bool = setting(True, flag(), "groups are channels, and go whole; else tensors, and single weights go")
    strength: float | None = setting(
        None, real("[0, inf)"), "lambda (published code: prunetrain_power = 0.01)", none="from penalty_ratio"
    )
    input_groups: bool = setting(False, flag(), "inputs of every layer are groups under the penalty, too")
    penalty_ratio: float = setting(0.02, real("[0, 1)"), "penalty's share of the whole loss at first (published: 0.2)")

    presets = {
        "paper": {},
        "repo": {"structured": False, "strength": 0.01, "initial_sparsity": 0.5, "mask_interval": 1},
    }

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The tensors under the penalty."""
        return self.layout.prunable_slots if self.structured else self.layout.prunable_slots[1:-1]

    def groups(self, vector: Tensor, slot: Slot) -> Tensor:
        """The view (groups, size of each) of a tensor in `vector` ((P,) or (n,))."""
        if not self.structured:
            return vector[None, slot.start : slot.stop]
        matrix = vector[slot.start : slot.stop].view(slot.shape[0], -1)
        return matrix.T if slot == self.layout.prunable_slots[-1] else matrix

    def penalised(self, vector: Tensor, slot: Slot) -> list[Tensor]:
        """The views (groups, ...) of a tensor in `vector` ((P,) or (n,)) over whose groups the penalty adds up norms.
        Images' channels are no groups, and the last layer has its inputs anyway."""
        views = [self.groups(vector, slot)]
        if self.input_groups and slot not in (self.layout.prunable_slots[0], self.layout.prunable_slots[-1]):
            views.append(vector[slot.start : slot.stop].view(*slot.shape[:2], -1).transpose(0, 1))
        return views

    def penalty(self, t: int) -> float:
        """lambda; from the ratio q it is q / (1 - q) * loss / norms at PyTorch's initial weights, where the loss is
        about ln(classes) and a group of k weights of variance 1 / (3 fan-in) has norm sqrt(k / (3 fan-in))."""
        if self.strength is not None:
            return self.strength
        norms = 0.0
        for slot in self.slots:
            variance = slot.shape[0] / (3 * (slot.stop - slot.start))
            for view in self.penalised(torch.empty(self.layout.prunable, device="meta"), slot):
                norms += len(view) * sqrt(view[0].numel() * variance)
        loss = log(self.layout.prunable_slots[-1].shape[0])
        return self.penalty_ratio / (1 - self.penalty_ratio) * loss / norms if norms else 0.0

    def add_lasso_gradient_(self, gradient: Tensor, masked: Tensor, strength: float) -> None:
        """Add strength * w_g / ||w_g||_2 for every group g; a group pruned to nothing gets 0, never NaN."""
        for slot in self.slots:
            for slopes, weights in zip(self.penalised(gradient, slot), self.penalised(masked, slot), strict=True):
                inside = tuple(range(1, weights.dim()))
                norms = torch.linalg.vector_norm(weights, dim=inside, keepdim=True)
                slopes.addcdiv_(weights, norms.clamp_min(torch.finfo(weights.dtype).tiny), value=strength)

    def kept(self, t: int) -> int:
        """How many weights pruning in round t keeps: s_t is cubic, over events if structured, else over rounds."""
        step, steps = t, self.rounds
        if self.structured:
            step, steps = t // self.mask_interval + 1, -(-self.rounds // self.mask_interval)
        return num_kept(sparsity_at(step, self.initial_sparsity, self.target_sparsity, steps), self.layout.prunable)

    def plan(self, offer: Message, memory: Memory, t: int) -> LocalPlan:
        plan, strength = super().plan(offer, memory, t), self.penalty(t)

        def lasso_(gradient: Tensor, masked: Tensor, dense: Tensor) -> None:
            self.add_lasso_gradient_(gradient, masked, strength)

        plan = replace(plan, add_gradient_=lasso_ if strength else None)
        if self.structured:
            return plan
        start = topk_mask(plan.weights[: self.layout.prunable].abs(), self.kept(t))
        return replace(plan, weights=self.layout.masked(plan.weights, start), mask=None, project=False)

    def reply(self, result: LocalResult, memory: Memory, t: int) -> tuple[Message, Memory]:
        if self.structured:
            return super().reply(result, memory, t)
        mask = self.magnitude_mask(result.weights, t)
        reply, memory = super().reply(replace(result, mask=mask), memory, t)
        return replace(reply, mask=mask), memory

    def accept(self, state, reply: Message, t: int) -> None:
        super().accept(state, reply, t)
        if not self.structured:
            expect_mask(reply)

    def merge(self, state, replies: Replies, t: int):
        new = super().merge(state, replies, t)
        if t % self.mask_interval:
            return new
        choose = self.channel_mask if self.structured else self.magnitude_mask
        return replace(new, mask=choose(new.weights, t, state.mask))

    def magnitude_mask(self, weights: Tensor, t: int, mask: Tensor | None = None) -> Tensor:
        """The mask (P,) of the largest magnitudes of `weights` (n,), whatever `mask` was; ends spared if few."""
        scores = weights[: self.layout.prunable].abs()
        ends = {self.layout.prunable_slots[0], self.layout.prunable_slots[-1]}
        if 2 * sum(slot.stop - slot.start for slot in ends) < self.kept(t):
            for slot in ends:
                scores[slot.start : slot.stop] = float("inf")
        return topk_mask(scores, self.kept(t))

    def channel_mask(self, weights: Tensor, t: int, mask: Tensor) -> Tensor:
        """The mask (P,) of the channels of `weights` (n,) with the largest root mean squares, nested in `mask`."""
        sizes, first = [], []
        for slot in self.slots:
            groups = self.groups(weights, slot)
            sizes.append(groups.square().mean(1))
            first.append(torch.zeros_like(sizes[-1]).index_fill_(0, sizes[-1].argmax(), 1))
        ranks = tie_broken(torch.cat(first), torch.cat(sizes)).argsort(stable=True).argsort()
        scores = torch.empty_like(mask, dtype=torch.float64)
        for slot, own in zip(self.slots, ranks.split([len(size) for size in sizes]), strict=True):
            self.groups(scores, slot).copy_(own[:, None])
        return nested_mask(mask, tie_broken(scores, weights[: self.layout.prunable].abs()), self.kept(t))
