"""MPFL: clients agree on a mask by exchanging masks alone, then train the sparse model from the initial weights."""

from dataclasses import dataclass, replace

from torch import Tensor

from ..core.settings import integer, setting
from ..core.sparsity import nested_mask, num_kept, tie_broken
from .base import About, LocalResult, Memory, Message, Method, Replies, account_of, expect_mask


@dataclass(frozen=True)
class MPFL(Method):
    """Stage one, the first M rounds: clients train from w_0 under the current mask, keep the largest magnitudes down
    to s_t, and send that mask alone: at most P bits and a header. The consensus is the most voted of the weights
    that the current mask keeps, ties by |w_0|. Stage two: masked federated averaging on that mask, from w_0.

    s_t rises linearly over the M = 10 exchanges, of which the first prunes nothing, and meets the target exactly at
    the last; masks are nested, since clients never hold what the mask dropped. Every exchange, and stage two, starts
    from w_0. Length, schedule and start are those of code that the first author published, TamirGez/MPFL `main.py`,
    `models.py`, `pruning_utils.py`. In stage one nobody keeps w_0, so every download is w_0 packed by the mask, with
    the mask, and is charged as such; accuracy is that of w_0*m until stage two.

    Still a reconstruction, for that code is of another experiment: it masks whole filters of convolutions alone, which
    hold 4 % of LeNet-5's prunable weights and 10 % of AlexNet's, so that no sparsity of 0.9 could be compared; here
    single weights are masked, by one threshold, among the weights that every method prunes. It trains the final model
    centrally, where the abstract says federated, from ImageNet weights. Its search for the threshold of votes stops
    at once or runs through; here the most voted down to the exact count are kept. Its clients prune a share of the
    rest, its server a share of the whole; here both a share of the whole.
    """

    about = About(
        title="MPFL", family="dense to sparse", mask_from="vote over clients' magnitudes", scope="global",
        step="masked SGD", up="m_n, then w*m", down="w_0*m and m, then w*m and m",
        source="arXiv 2312.03889; TamirGez/MPFL",
        assumed="single weights, globally (its code: filters of convolutions); the most voted at the exact "
        "count, ties by |w_0|; stage two federated; w_0 sent with every mask",
    )  # fmt: skip

    initial_sparsity: float = 0.0
    target_sparsity: float = 0.9
    mask_rounds: int = setting(10, integer(1), "rounds M spent on the mask; one is left for stage two if there are two")

    @property
    def exchanges(self) -> int:
        """M, with one round left for stage two if there are two."""
        return max(1, min(self.mask_rounds, self.rounds - 1))

    def vote(self, mask: Tensor | None, scores: Tensor, t: int) -> Tensor:
        """The mask (P,) of stage one's round t, nested in `mask`, by `scores` (P,) >= 0."""
        done = t / (self.exchanges - 1) if self.exchanges > 1 else 1.0
        sparsity = self.initial_sparsity + (self.target_sparsity - self.initial_sparsity) * done
        return nested_mask(mask, scores, num_kept(sparsity, self.layout.prunable))

    def reply(self, result: LocalResult, memory: Memory, t: int) -> tuple[Message, Memory]:
        if t >= self.exchanges:
            return super().reply(result, memory, t)
        magnitudes = result.weights[: self.layout.prunable].abs()
        return Message(None, self.vote(result.mask, magnitudes, t), account_of(result)), memory

    def accept(self, state, reply: Message, t: int) -> None:
        if t >= self.exchanges:
            return super().accept(state, reply, t)
        expect_mask(reply)

    def merge(self, state, replies: Replies, t: int):
        if t >= self.exchanges:
            return super().merge(state, replies, t)
        votes = sum(reply.mask.int() for reply in replies.values())
        scores = tie_broken(votes, state.weights[: self.layout.prunable].abs())
        return replace(state, round=t + 1, mask=self.vote(state.mask, scores, t))
