"""FedSparsify: purge, merge, tune. `Global` purges the average at the server, `Local` each client its own model."""

from dataclasses import dataclass, replace

from torch import Tensor

from ..core.schedules import sparsity_at
from ..core.settings import integer, setting
from ..core.sparsity import nested_mask, num_kept
from .base import About, LocalPlan, LocalResult, Memory, Message, Method, Replies, expect_mask


@dataclass(frozen=True)
class FedSparsifyGlobal(Method):
    """Clients train under the global mask; the server purges their average to s_t by global magnitude. Masks are
    nested: what is purged never returns.

    The source counts rounds r = 1 .. T and purges to s_t = s_f + (s_i - s_f) (1 - (r - t0) / (T - t0))^3 with
    s_i = 0, t0 = 1 whenever r is a multiple of f = 1: with t = r - 1 the cubic over T - 1 rounds, which ends at s_f.
    Deviations: f is `mask_interval`, and the last round always purges, so that s_f is met whatever f; biases and
    BatchNorm are not purged, as in every method here.
    Source: Stripelis et al. 2022; dstripelis/FedSparsify `utils/model_purge.py`.
    """

    about = About(
        title="FedSparsify-Global", family="dense to sparse", mask_from="magnitude of the average",
        scope="global", step="masked SGD", up="w*m", down="w*m and m",
        source="arXiv 2204.12430; dstripelis/FedSparsify",
    )  # fmt: skip

    initial_sparsity: float = 0.0
    target_sparsity: float = 0.9
    mask_interval: int = 1

    def kept(self, t: int) -> int:
        """How many weights a purge in round t keeps."""
        sparsity = sparsity_at(t, self.initial_sparsity, self.target_sparsity, max(self.rounds - 1, 1))
        return num_kept(sparsity, self.layout.prunable)

    def due(self, t: int) -> bool:
        """Whether round t ends with a purge."""
        return (t + 1) % self.mask_interval == 0 or t + 1 == self.rounds

    def purges(self, t: int) -> bool:
        """Whether round t ends with a purge that takes anything away."""
        return self.due(t) and self.kept(t) < self.layout.prunable

    def merge(self, state, replies: Replies, t: int):
        new = super().merge(state, replies, t)
        return replace(new, mask=self.next_mask(new, replies, t)) if self.purges(t) else new

    def next_mask(self, new, replies: Replies, t: int) -> Tensor:
        """The mask (P,) after a purge, from the state `new` before it, whose weights are the mean, and the replies."""
        return nested_mask(new.mask, new.weights[: self.layout.prunable].abs(), self.kept(t))


@dataclass(frozen=True)
class FedSparsifyLocal(FedSparsifyGlobal):
    """Each client purges its own model to s_t and sends what is left with its mask; a weight survives if at least
    floor(K/2) of the K clients kept it, as the mean over all of them with zeros counted.

    So the merged model has no exact sparsity of its own: the column `sparsity` tells. Deviation: with K = 1, where
    floor(K/2) = 0 would keep everything, one vote is needed.
    Source: as above, `utils/model_merge.py` and the history of `-Local` up to commit 5c6ac1d.
    """

    about = replace(
        FedSparsifyGlobal.about, title="FedSparsify-Local",
        mask_from="vote over clients' magnitudes", up="w*m_n and m_n",
    )  # fmt: skip

    tune_epochs: int = setting(0, integer(0), "local epochs after the purge (source: `fine_tuning_epochs`)")

    def plan(self, offer: Message, memory: Memory, t: int) -> LocalPlan:
        plan = super().plan(offer, memory, t)

        def tuned(result: LocalResult) -> LocalPlan:
            own = nested_mask(plan.mask, result.weights[: self.layout.prunable].abs(), self.kept(t))
            purged = self.layout.masked(result.weights, own)
            return LocalPlan(purged, own, result.buffers, project=True, epochs=self.tune_epochs)

        return replace(plan, then=tuned) if self.purges(t) else plan

    def reply(self, result: LocalResult, memory: Memory, t: int) -> tuple[Message, Memory]:
        reply, memory = super().reply(result, memory, t)
        return replace(reply, mask=result.mask) if self.purges(t) else reply, memory

    def accept(self, state, reply: Message, t: int) -> None:
        super().accept(state, reply, t)
        if self.purges(t):
            expect_mask(reply)

    def next_mask(self, new, replies: Replies, t: int) -> Tensor:
        votes = sum(reply.mask.int() for reply in replies.values())
        return votes >= max(len(replies) // 2, 1)
