"""FedX: the server prunes what is irrelevant to its own reference images."""

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ..core.settings import integer, one_of, real, setting
from ..core.sparsity import nested_mask
from .base import About, Replies
from .fedsparsify import FedSparsifyGlobal
from .relevance import gradient_activation, layerwise_relevance


@dataclass(frozen=True)
class FedX(FedSparsifyGlobal):
    """Masked federated averaging; every `mask_interval` rounds, and at last, the server prunes the average to s_t,
    keeping the weights that matter most to the scores of its reference images. s_t is FedSparsify's: cubic, and ends
    at the target.

    A weight's score is the mean over classes of |its relevance to that class's images together|. The reference images
    are labelled training images that no client has: a cost in data and privacy that the other methods do not pay.

    A reconstruction: the abstracts name backpropagation-based explanations, at the server, of relevant components.
    Source: arXiv 2508.06256 and its predecessor 2501.11493 (layer-wise relevance propagation).
    """

    about = About(
        title="FedX", family="dense to sparse", mask_from="relevance to the server's images", scope="global",
        step="masked SGD", up="w*m", down="w*m and m", source="arXiv 2508.06256, 2501.11493",
        assumed="single weights as components; reference images held by the server; epsilon rule; schedule; "
        "sparse uploads; no return of pruned weights",
    )  # fmt: skip

    mask_interval: int = 5
    relevance: str = setting(
        "lrp", one_of("lrp", "gradient_activation"), "propagated layer by layer, or weight times gradient of the loss"
    )
    reference_per_class: int = setting(10, integer(1), "training images of each class that the server keeps (assumed)")
    epsilon: float = setting(
        0.25, real("[0, inf)"), "of the epsilon rule, over the root mean square of a layer's output (assumed)"
    )

    def due(self, t: int) -> bool:
        return t % self.mask_interval == 0 or t + 1 == self.rounds

    def next_mask(self, new, replies: Replies, t: int) -> Tensor:
        return nested_mask(new.mask, self.scores(new), self.kept(t))

    def scores(self, state) -> Tensor:
        """Relevance (P,) >= 0 of each prunable weight of the sparse model; 0 where it is pruned."""
        model = self.context.scratch()
        model.load(state.weights, state.mask, state.buffers)
        model.module.eval()
        rules = {"lrp": partial(layerwise_relevance, epsilon=self.epsilon), "gradient_activation": gradient_activation}
        images, labels = self.context.images, self.context.labels
        by_class = zip(images.split(self.reference_per_class), labels.split(self.reference_per_class), strict=True)
        each = [rules[self.relevance](model, *group)[: self.layout.prunable].abs() for group in by_class]
        return sum(each) / len(each)
