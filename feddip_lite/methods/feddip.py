"""FedDIP: dynamic pruning with error feedback, under a penalty that grows step by step; FedDP is FedDIP without it.

Where the slides are silent, the published code decides. Where the two differ, or the code is at fault (D1, D8, D12,
D13, D17), each choice is an option; `repo` takes the code's side and `memory` adds the server's dense memory
(docs/deviations.md).
"""

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
    upload: str = setting("dense", one_of("dense", "masked"), "what goes up: all, or only what counts (D10)")
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
        if self.upload == "masked" and self.server_memory:
            raise ValueError("upload: 'masked' is not valid with server_memory; the memory needs 'dense' uploads")

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
        # Packing is exact where the server would not look at the pruned part: whenever it chooses no mask, and
        # always if it chooses from the masked average. In round 0 a client's own mask is unknown to the server.
        counts_only_kept = self.mask_source == "masked_average" or not self.chooses_mask(t)
        own_mask = t == 0 and self.erk == "per_client"
        if self.upload == "masked" and counts_only_kept and not own_mask:
            return super().reply(result, memory, t)
        return message_of(result, result.weights), memory

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
        sparsity = sparsity_at(t, self.initial_sparsity, self.target_sparsity, self.rounds)
        mask = self.magnitude_mask(source, sparsity)
        return replace(new, mask=mask, weights=self.readmitted(new.weights, mask, mask & ~state.mask))

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
