"""MPFL: clients agree on a mask by exchanging masks alone, then train the sparse model from the initial weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..checks import real, setting
from ..message import Message
from ..plan import LocalResult
from ..schedules import sparsity_at
from ..sparsity import nested_mask, num_kept, tie_broken
from .base import About, Memory, Method, Replies, account_of


@dataclass(frozen=True)
class MPFL(Method):
    """Stage one, the first M rounds: clients train from w_0 under the current mask, keep the largest magnitudes down
    to s_t, and send that mask alone: at most P bits and a header. The consensus is the most voted of the weights
    that the current mask keeps, ties by |w_0|. Stage two: masked federated averaging on that mask, from w_0.

    A reconstruction from the abstract. s_t is cubic over stage one and meets the target exactly at its end; masks
    are nested, since clients never hold what the mask dropped. In stage one nobody keeps w_0, so every download is
    w_0 packed by the mask, with the mask, and is charged as such; accuracy is that of w_0*m until stage two.
    """

    about = About(
        "MPFL", "dense to sparse", "vote over clients' magnitudes", "global", False, "masked SGD",
        "m_n, then w*m", "w_0*m and m, then w*m and m", "arXiv 2312.03889",
        assumed="magnitude as score; global; length and schedule of stage one; votes, ties by |w_0|; stage two starts "
        "from w_0; w_0 sent with every mask",
    )  # fmt: skip

    initial_sparsity: float = 0.0
    target_sparsity: float = 0.9
    mask_share: float = setting(0.2, real("(0, 1)"), "share of the rounds spent on the mask (assumed)")

    @property
    def mask_rounds(self) -> int:
        """M: at least one, and one round left for stage two if there are two."""
        return max(1, min(round(self.mask_share * self.rounds), self.rounds - 1))

    def vote(self, mask: Tensor, scores: Tensor, t: int) -> Tensor:
        """The mask (P,) of stage one's round t, nested in `mask`, by `scores` (P,) >= 0."""
        sparsity = sparsity_at(t + 1, self.initial_sparsity, self.target_sparsity, self.mask_rounds)
        return nested_mask(mask, scores, num_kept(sparsity, self.layout.prunable))

    def reply(self, result: LocalResult, memory: Memory, t: int) -> tuple[Message, Memory]:
        if t >= self.mask_rounds:
            return super().reply(result, memory, t)
        magnitudes = result.weights[: self.layout.prunable].abs()
        mask = torch.ones_like(magnitudes, dtype=torch.bool) if result.mask is None else result.mask
        return Message(None, self.vote(mask, magnitudes, t), account_of(result)), memory

    def merge(self, state, replies: Replies, t: int):
        if t >= self.mask_rounds:
            return super().merge(state, replies, t)
        votes = sum(reply.mask.int() for reply in replies.values())
        scores = tie_broken(votes, state.weights[: self.layout.prunable].abs())
        return replace(state, round=t + 1, mask=self.vote(state.mask, scores, t))
