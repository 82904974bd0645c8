"""FedDIP: dynamic pruning with error feedback, under a penalty that grows step by step; FedDP is FedDIP without it.

Where the slides are silent, the published code decides. Where the two differ, or the code is at fault (D1, D8, D12,
D13, D17), each choice is an option; `repo` takes the code's side and `memory` adds the server's dense memory
(docs/deviations.md).
"""

from collections.abc import Generator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.schedules import penalty_at, published_penalty_at, sparsity_at
from ..core.seeds import derive
from ..core.settings import flag, one_of, setting
from ..core.sparsity import erk_densities, num_kept, random_mask, topk_mask
from ..core.state import ServerState
from ..core.terms import NormTerm, SquareTerm, Terms, WithoutPruned
from .base import About, LocalPlan, LocalResult, Memory, Message, Method, Replies, message_of


@dataclass(frozen=True)
class FedDP(Method):
    """Dynamic pruning with error feedback: gradients at w*m, steps and uploads of the dense w, and every
    `mask_interval` rounds a new global magnitude mask. Source: slides, Eq. 1-2; published code `fl_server.py`."""

    about = About(
        title="FedDP", family="sparse to sparse", mask_from="magnitude of the average", scope="global",
        regrows=True, step="gradient at w*m, dense step", up="dense w", down="w*m and m",
        source="FedDIP without its penalty: arXiv 2309.06805; EricLoong/feddip",
    )  # fmt: skip

    initial_sparsity: float = 0.5
    target_sparsity: float = 0.9
    mask_interval: int = 5
    erk: str = setting(
        "per_client",
        one_of("per_client", "shared", "magnitude", "none"),
        "mask of round 0: each client's own random ERK mask, a shared one, that of the initial magnitudes, none (D7)",
    )
    erk_over: str = setting(
        "weights", one_of("weights", "prunable"), "tensors that ERK spreads its density over: which (D7)"
    )
    mask_source: str = setting(
        "dense_average", one_of("dense_average", "masked_average"), "average from which a mask is chosen (D8)"
    )
    server_memory: bool = setting(False, flag(), "the server keeps its dense weights between rounds (D9)")
    feedback: str = setting(
        "within_round", one_of("within_round", "none"), "whether pruned weights take steps, too (slides, Eq. 1)"
    )
    reentry: str = setting(
        "memory",
        one_of("memory", "clipped", "zero"),
        "where a weight that returns begins: at its dense value, at most at the smallest magnitude kept, at zero",
    )
    upload: str = setting(
        "dense",
        one_of("dense", "masked", "screened"),
        "what goes up: all, or only what counts, if a mask is chosen after further exchanges that find it (D10)",
    )
    bn_statistics: str = setting("masked", one_of("masked", "dense"), "model whose batches feed BatchNorm (D12)")
    test_leak: bool = setting(False, flag(), "BatchNorm also sees the client's test images before the upload (D13)")
    normalisation: str = setting("correct", one_of("correct", "published"), "of CIFAR-100's images (D17)")
    shortcuts: str = setting("dense", one_of("dense", "pruned"), "ResNet's 1x1 convolutions (D19)")

    presets = {
        "paper": {},
        "repo": {
            "mask_source": "masked_average",
            "bn_statistics": "dense",
            "test_leak": True,
            "normalisation": "published",
        },
        "memory": {"server_memory": True},
    }

    def __post_init__(self):
        if self.upload != "dense" and self.server_memory:
            raise ValueError(f"upload: {self.upload!r} is not valid with server_memory, which needs 'dense' uploads")

    def start(self) -> tuple[Tensor, Memory]:
        if self.erk != "shared":
            return super().start()
        return self.erk_mask(derive(self.seed, "mask")), {}

    def begin(self, state: ServerState) -> ServerState:
        if self.erk != "magnitude":
            return state
        return replace(state, mask=self.magnitude_mask(state.weights, self.initial_sparsity))

    def erk_mask(self, seed: int) -> Tensor:
        """A random mask (P,) at ERK densities of the initial sparsity. ResNet's shortcuts, where they are not prunable,
        have a share in the density, as in the published code, but stay dense (D7)."""
        slots = self.layout.weight_slots if self.erk_over == "weights" else self.layout.prunable_slots
        densities = erk_densities([slot.shape for slot in slots], 1 - self.initial_sparsity)
        prunable = densities[: self.layout.num_prunable]
        return random_mask(self.layout, prunable, torch.Generator().manual_seed(seed))

    def offer(self, state, t: int, client: int) -> Message:
        offer = super().offer(state, t, client)
        if t > 0 or self.erk != "per_client" or not self.initial_sparsity:
            return offer
        return offer.plus(mask_seed=torch.tensor([derive(self.seed, "mask", t, client)]))

    def plan(self, offer: Message, memory: Memory, t: int) -> LocalPlan:
        differing = {"dense_statistics": self.bn_statistics == "dense", "test_leak": self.test_leak}
        plan = replace(super().plan(offer, memory, t), project=False, **differing)
        if "mask_seed" in offer.extras:
            own = self.erk_mask(int(offer.extras["mask_seed"][0]))
            plan = replace(plan, mask=own.to(plan.weights.device))
        if self.feedback == "none" and plan.mask is not None:
            plan = replace(plan, add_gradient_=WithoutPruned(plan.mask))
        return plan

    def reply(self, result: LocalResult, memory: Memory, t: int) -> tuple[Message, Memory]:
        if self.upload != "dense" and self.knows_masks(t) and (not self.reads_pruned(t) or self.inquires(t)):
            return super().reply(result, memory, t)
        return message_of(result, result.weights), memory

    def knows_masks(self, t: int) -> bool:
        """Whether the server knows the masks that clients train under: not those that are their own, of round 0."""
        return t > 0 or self.erk != "per_client"

    def reads_pruned(self, t: int) -> bool:
        """Whether the server looks at pruned weights in round t: to choose a mask, but from the masked average."""
        return self.chooses_mask(t) and self.mask_source == "dense_average"

    def inquires(self, t: int) -> bool:
        return self.upload == "screened" and self.reads_pruned(t) and self.knows_masks(t)

    def inquire(self, state, replies: Replies, t: int) -> Generator[Message, Replies, Replies]:
        """Which pruned weights can enter the new mask, of k weights? Those of which a client's own is at least tau, the
        k-th largest magnitude of the mean's kept part: what enters only raises it, and |sum rho_n w_n| <= max |w_n|.
        All others count as 0 from here on, and the mask is the same. tau = 0 if more are to be kept than are now."""
        mask, prunable = state.mask, self.layout.prunable
        if mask.all():
            return replies
        kept = self.mean_weights(state, replies)[:prunable][mask].abs()
        count = num_kept(self.sparsity(t), prunable)
        threshold = kept.topk(count).values[-1:] if 0 < count <= len(kept) else kept.new_zeros(1)
        named = yield Message(None, None, {"threshold": threshold})
        wanted = torch.stack([answer.mask for answer in named.values()]).any(0) & ~mask
        if not wanted.any():
            return replies
        found = yield Message(None, wanted)
        dense = {client: self.layout.unpack(reply.values, mask) for client, reply in replies.items()}
        for client, weights in dense.items():
            weights[:prunable][wanted] = found[client].values
        return {client: replace(reply, values=dense[client]) for client, reply in replies.items()}

    def tell(self, question: Message, own: Message, t: int) -> Message:
        if question.mask is not None:
            return super().tell(question, own, t)
        large = own.values[: self.layout.prunable].abs() >= question.extras["threshold"]
        return Message(None, large & ~own.mask)

    def chooses_mask(self, t: int) -> bool:
        """Whether the server chooses a new mask at the end of round t."""
        return t % self.mask_interval == 0

    def merge(self, state, replies: Replies, t: int):
        new = super().merge(state, replies, t)
        if self.server_memory:
            new = replace(new, weights=self.remembered(state, new.weights))
        if not self.chooses_mask(t):
            return new
        source = new.weights if self.mask_source == "dense_average" else self.layout.masked(new.weights, new.mask)
        mask = self.magnitude_mask(source, self.sparsity(t))
        return replace(new, mask=mask, weights=self.readmitted(new.weights, mask, mask & ~state.mask))

    def sparsity(self, t: int) -> float:
        """Of the mask that is chosen in round t."""
        return sparsity_at(t, self.initial_sparsity, self.target_sparsity, self.rounds)

    def magnitude_mask(self, weights: Tensor, sparsity: float) -> Tensor:
        """The global mask (P,) of this sparsity that keeps the largest of the prunable `weights` (n,)."""
        return topk_mask(weights[: self.layout.prunable].abs(), num_kept(sparsity, self.layout.prunable))

    def readmitted(self, weights: Tensor, mask: Tensor, returning: Tensor) -> Tensor:
        """The dense `weights` (n,) under their new `mask` (P,): those `returning` to it begin where `reentry` says.
        While it was pruned, a weight remembered by the server took steps that were never felt, so it may come back
        far too large."""
        if self.reentry == "memory" or not returning.any():
            return weights
        prunable, weights = weights[: self.layout.prunable], weights.clone()
        limit = prunable[mask].abs().min() if self.reentry == "clipped" else 0.0
        weights[: self.layout.prunable] = torch.where(returning, prunable.clamp(-limit, limit), prunable)
        return weights


@dataclass(frozen=True)
class FedDIP(FedDP):
    """FedDP with incremental regularisation: + lambda_t * sum over prunable tensors of ||w_l * m_l||_2, lambda_t
    growing by steps (slides, Eq. 3). The norm is not squared, as in the published code; `norm` "squared" is
    + lambda_t / 2 * ||w_l * m_l||_2^2 (D3). A constant lambda = penalty_max is for comparison."""

    about = replace(
        FedDP.about, title="FedDIP", step="as FedDP, under a growing penalty",
        source="arXiv 2309.06805; EricLoong/feddip",
    )  # fmt: skip

    penalty_max: float = 1e-3
    penalty_steps: int = 20
    lambda_schedule: str = setting(
        "eq3", one_of("eq3", "repo", "constant"), "growth: slides' Eq. 3, the published code's (D1)"
    )
    norm: str = setting("plain", one_of("plain", "squared"), "of each tensor in the penalty (D3)")

    presets = {**FedDP.presets, "repo": {**FedDP.presets["repo"], "lambda_schedule": "repo"}}

    def penalty(self, t: int) -> float:
        schedules = {"eq3": penalty_at, "repo": published_penalty_at, "constant": lambda t, peak, steps, rounds: peak}
        return schedules[self.lambda_schedule](t, self.penalty_max, self.penalty_steps, self.rounds)

    def plan(self, offer: Message, memory: Memory, t: int) -> LocalPlan:
        plan, strength = super().plan(offer, memory, t), self.penalty(t)
        if not strength:
            return plan
        penalty = {"plain": NormTerm, "squared": SquareTerm}[self.norm](self.layout, strength)
        return replace(plan, add_gradient_=Terms((plan.add_gradient_, penalty)) if plan.add_gradient_ else penalty)
