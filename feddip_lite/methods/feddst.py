"""FedDST: a sparse model from the first round to the last, whose mask the clients themselves readjust: each drops its
smallest weights and grows others where the gradient is large, layer by layer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.flat import Layout
from ..core.message import Message
from ..core.plan import LocalPlan, LocalResult
from ..core.schedules import cosine_at
from ..core.seeds import torch_generator
from ..core.settings import flag, one_of, real, setting
from ..core.sparsity import erk_densities, kept_per_layer, layerwise_mask, random_mask
from ..core.state import Memory
from .base import About, Method, Replies, expect_mask, mean_buffers, message_of, samples_of


@dataclass(frozen=True)
class FedDST(Method):
    """Federated dynamic sparse training (Bibikar et al. 2022); published code bibikar/feddst `dst.py`, `models.py`.

    Every `mask_interval` rounds, after local training, a client drops a cosine-annealed share of each layer's weights
    by magnitude and grows as many by |gradient|, taken at the trained weights before the drop, as both published
    codes do; grown weights start at 0. The server averages each coordinate over those who kept it and prunes every
    layer back to its ERK count.

    Preset `repo` is the variant of FedDIP's authors (`feddst.py`, `client.py:train_model_dst`): a random first mask;
    masks that change in the last round of each interval rather than the second; clients that keep their own mask after
    their first readjustment, from the next participation on; drops by the magnitude received, growth by the mean
    gradient of a whole pass; and a plain mean in which pruned weights count as 0.

    Deviations: growth by the gradient of the training loss, over pruned coordinates only (published code: of softmax
    fed to cross-entropy, over all coordinates; FedDIP's authors: of `nll_loss` on raw logits). The annealing factor
    counts once. ERK densities as for all methods here and in FedDIP's code; FedDST's own formula makes layers nearly
    alike, which leaves less of the signal in an untrained AlexNet (docs/deviations.md). No more weights of a layer
    are dropped than are pruned there, so a dense layer stays as it is. Under `repo` a client that never readjusted
    follows the server's mask, and an own mask travels with its weights, since otherwise the server could not place
    them.
    """

    about = About(
        title="FedDST", family="sparse to sparse", mask_from="clients' magnitudes and gradients", scope="layer",
        regrows=True, step="masked SGD, then readjust", up="sparse, with own mask when readjusted",
        down="sparse and mask", source="arXiv 2112.09824; bibikar/feddst",
    )  # fmt: skip

    target_sparsity: float = 0.9
    mask_interval: int = 15
    readjust_in: str = setting(
        "second", one_of("first", "second", "last"), "round of each interval in which masks change: which"
    )
    replaced: float = setting(
        0.01, real("[0, 1]"), "share of a layer's kept weights replaced at first (published commands: 0.01)"
    )
    replace_until: float = setting(0.5, real("(0, 1]"), "share of the rounds after which nothing is replaced any more")
    first_mask: str = setting("magnitude", one_of("magnitude", "random"), "weights of round 0 at ERK densities: which")
    drop_by: str = setting(
        "trained", one_of("trained", "received"), "magnitude of which weights decides what is dropped"
    )
    grow_by: str = setting("batch", one_of("batch", "epoch"), "gradient over what decides where to grow")
    own_masks: bool = setting(False, flag(), "clients keep the masks they readjusted, and zeros count in the mean")

    presets = {
        "paper": {},
        "repo": {
            "mask_interval": 20, "readjust_in": "last", "replaced": 0.5, "replace_until": 1.0, "first_mask": "random",
            "drop_by": "received", "grow_by": "epoch", "own_masks": True,
        },
    }  # fmt: skip

    @property
    def densities(self) -> list[float]:
        """ERK densities of the prunable tensors at the target sparsity."""
        return erk_densities([slot.shape for slot in self.layout.prunable_slots], 1 - self.target_sparsity)

    @property
    def counts(self) -> list[int]:
        """How many weights of each prunable tensor are kept, in every round."""
        slots = zip(self.densities, self.layout.prunable_slots, strict=True)
        return [round(density * (slot.stop - slot.start)) for density, slot in slots]

    def share(self, t: int) -> float:
        """Share of each layer's kept weights that clients replace in round t; 0 = no readjustment."""
        first = {"first": 0, "second": 1, "last": self.mask_interval - 1}[self.readjust_in]
        if (t - first) % self.mask_interval:
            return 0.0
        return cosine_at(t, self.replaced, self.replace_until * self.rounds)

    def start(self) -> tuple[Tensor, Memory]:
        return random_mask(self.layout, self.densities, torch_generator(self.seed, "mask")), {}

    def begin(self, state):
        if self.first_mask == "random":
            return state
        magnitudes = state.weights[: self.layout.prunable].abs()
        return replace(state, mask=layerwise_mask(self.layout, magnitudes, self.counts))

    def plan(self, offer: Message, memory: Memory, t: int) -> LocalPlan:
        plan = super().plan(offer, memory, t)
        if "mask" in memory:
            plan = replace(plan, mask=memory["mask"])
        if plan.mask is None or not self.share(t):
            return plan

        def pruned(result: LocalResult) -> LocalPlan:
            weights = plan.weights if self.drop_by == "received" else result.weights
            drop = replaceable(self.layout, plan.mask, self.share(t))
            mask = without_smallest(self.layout, plan.mask, weights, drop)
            start = self.layout.masked(result.weights, mask)
            return LocalPlan(start, mask, result.buffers, epochs=0)

        return replace(plan, final_gradient=self.grow_by, then=pruned)

    def reply(self, result: LocalResult, memory: Memory, t: int) -> tuple[Message, Memory]:
        mask = result.mask
        if result.parts:
            trained = result.parts[0]
            mask = self.regrown(mask, trained.gradient)
            if self.own_masks:  # from its next participation on
                result, mask, memory = trained, trained.mask, {"mask": mask}
        elif "mask" not in memory:
            return super().reply(result, memory, t)
        return replace(message_of(result, self.layout.pack(result.weights, mask)), mask=mask), memory

    def regrown(self, mask: Tensor, gradient: Tensor) -> Tensor:
        """The pruned `mask` (P,), filled up to each layer's count where |gradient| ((n,)) is largest."""
        kept = kept_per_layer(self.layout, mask)
        missing = [max(0, count - now) for count, now in zip(self.counts, kept, strict=True)]
        return mask | layerwise_mask(self.layout, strength(gradient, ~mask), missing)

    def accept(self, state, reply: Message, t: int) -> None:
        super().accept(state, reply, t)
        if self.share(t) and not state.mask.all():
            expect_mask(reply)

    def merge(self, state, replies: Replies, t: int):
        if all(reply.mask is None for reply in replies.values()):
            return super().merge(state, replies, t)
        mean, support = mean_where_kept(self.layout, state.mask, replies)
        weights = self.mean_weights(state, replies) if self.own_masks else mean
        # Grown weights are 0 in every reply that has them: those that more samples speak for come first, and what
        # nobody keeps comes last. (The published code leaves such ties to the order of coordinates.)
        magnitudes = weights[: self.layout.prunable].abs().double()
        scores = torch.where(magnitudes > 0, magnitudes, support - 1)
        mask = layerwise_mask(self.layout, scores, self.counts)
        return replace(state, round=t + 1, weights=weights, buffers=mean_buffers(state, replies), mask=mask)


def strength(vector: Tensor, where: Tensor) -> Tensor:
    """|vector| of the prunable coordinates in `where` ((P,) bool), -1 elsewhere: scores that rank these last."""
    return vector[: len(where)].abs().masked_fill(~where, -1)


def replaceable(layout: Layout, mask: Tensor, share: float) -> list[int]:
    """How many weights of each prunable tensor a `share` of those kept is; at most as many as are pruned there."""
    sizes = [slot.stop - slot.start for slot in layout.prunable_slots]
    return [min(round(share * kept), n - kept) for kept, n in zip(kept_per_layer(layout, mask), sizes, strict=True)]


def without_smallest(layout: Layout, mask: Tensor, weights: Tensor, drop: Sequence[int]) -> Tensor:
    """`mask` (P,) less the `drop[l]` weights of smallest magnitude of each prunable tensor l."""
    keep = [kept - count for kept, count in zip(kept_per_layer(layout, mask), drop, strict=True)]
    return layerwise_mask(layout, strength(weights, mask), keep)


def mean_where_kept(layout: Layout, mask: Tensor, replies: Replies) -> tuple[Tensor, Tensor]:
    """Per coordinate, the mean over those who kept it: sum_n D_n m_n w_n / sum_n D_n m_n, 0 where nobody did.

    A reply without a mask of its own kept what `mask` does.

    Returns:
        (mean (n,) float32, support (P,) float64: the share of all samples behind each prunable coordinate).
    """
    total = sum(samples_of(replies).values())
    weighted = torch.zeros(layout.size, dtype=torch.float64, device=mask.device)
    support = torch.zeros(layout.prunable, dtype=torch.float64, device=mask.device)
    for client, count in samples_of(replies).items():
        kept = mask if replies[client].mask is None else replies[client].mask
        vector = layout.masked(layout.unpack(replies[client].values, kept), kept)
        weighted.add_(vector.double(), alpha=count / total)
        support.add_(kept, alpha=count / total)
    weighted[: layout.prunable].div_(support.masked_fill(support == 0, 1))
    return weighted.float(), support
