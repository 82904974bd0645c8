"""FedMap: one mask for all, shrinking by the same share at every pruning event."""

from dataclasses import dataclass, replace

from ..core.sparsity import nested_mask, num_kept
from .base import About, Method, Replies


@dataclass(frozen=True)
class FedMap(Method):
    """Iterative magnitude pruning from scratch: every `mask_interval` rounds, round 0 included, the same share p of
    the weights *left* goes, by global magnitude of the average. Masks are nested and the same at every client.

    A reconstruction from the abstract. p follows from the target: of E = ceil(T/R) events, event k leaves a density
    of (1 - target)^(k/E), so p = 1 - (1 - target)^(1/E) and the last event meets the target exactly. The source has
    clients prune by the shared schedule; all would choose the same mask, so here the server does. What then sets it
    apart from FedSparsify-Global is the geometric schedule alone.
    """

    about = About(
        title="FedMap", family="dense to sparse", mask_from="magnitude of the average", scope="global",
        step="masked SGD", up="w*m", down="w*m and m", source="arXiv 2406.19050",
        assumed="global magnitude; prunable tensors; pruning every R = 5 rounds from round 0, at a rate that "
        "meets the target; the server prunes",
    )  # fmt: skip

    target_sparsity: float = 0.9
    mask_interval: int = 5

    def sparsity(self, t: int) -> float:
        """Sparsity after the last pruning event up to round t."""
        event, events = t // self.mask_interval + 1, -(-self.rounds // self.mask_interval)
        return self.target_sparsity if event == events else 1 - (1 - self.target_sparsity) ** (event / events)

    def merge(self, state, replies: Replies, t: int):
        new = super().merge(state, replies, t)
        if t % self.mask_interval:
            return new
        prunable = self.layout.prunable
        keep = num_kept(self.sparsity(t), prunable)
        return replace(new, mask=nested_mask(state.mask, new.weights[:prunable].abs(), keep))
