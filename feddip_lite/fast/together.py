"""Which clients of a round are trained at once, and that they are: for each what `train.client.local_update` gives.

How: `steps.py`, for clients whose plans are of one kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from ..config import Config
from ..core.flat import FlatModel, Layout
from ..core.models import LeNet5
from ..core.plan import LocalPlan, LocalResult
from ..data.datasets import Dataset
from .stacked import KNOWN
from .steps import MOST_TERMS, Kind, Stack, is_known, terms_of

GROUPED = (LeNet5,)
"""Models of which one pass computes all clients. It saves launches, and larger models are not bound by these: they take
one pass per client, in the same recording, with the ordinary convolutions."""


def kind_of(plan: LocalPlan, layout: Layout) -> Kind | None:
    """The kind of a plan for a model of this layout; None for one that asks for more than steps of training, or for
    terms that are not known here."""
    if plan.mode != "train" or plan.epochs == 0 or plan.final_gradient or plan.then or plan.model is not None:
        return None
    if layout.buffer_size and (plan.dense_statistics or plan.buffers is None):
        return None
    terms = terms_of(plan)
    if len(terms) > MOST_TERMS or not all(is_known(term, plan, layout) for term in terms):
        return None
    masked = plan.mask is not None
    return Kind(masked, masked and plan.project, plan.squared_gradients, tuple(map(type, terms)))


class Together:
    """Trains those clients of a round that can be trained together.

    Args:
        model: one of `stacked.KNOWN`, on the device. Only its structure is used.
        record: as for `cuda_graph.CudaGraph`.
        grouped: whether one pass computes all clients; None = as GROUPED says.
    """

    def __init__(self, model: FlatModel, config: Config, record: Callable, grouped: bool | None = None):
        self.model, self.config, self.record = model, config, record
        self.grouped = type(model.module) in GROUPED if grouped is None else grouped
        self.stacks: dict[int, Stack] = {}

    @staticmethod
    def fits(model: FlatModel) -> bool:
        """Whether a model can be stacked."""
        return type(model.module) in KNOWN and not model.draws

    def __call__(
        self, plans: Mapping[int, LocalPlan], data: Dataset, shards: Sequence[Tensor], t: int
    ) -> dict[int, LocalResult]:
        """The results of round t by client id, of those clients that have company: two or more plans of one kind.

        Args:
            plans: by client id. shards: training samples of all clients by id, int64 (k,) on the device.
        """
        kinds: dict[Kind, list[int]] = {}
        for client, plan in plans.items():
            kind = kind_of(plan, self.model.layout)
            if kind is not None and len(shards[client]):
                kinds.setdefault(kind, []).append(client)
        results = {}
        for kind, clients in kinds.items():
            if len(clients) > 1:
                stack = self._stack(len(clients))
                results |= stack.train(kind, {client: plans[client] for client in clients}, data, shards, t)
        return results

    def _stack(self, clients: int) -> Stack:
        if clients not in self.stacks:
            self.stacks[clients] = Stack(self.model, clients, self.config, self.record, self.grouped)
        return self.stacks[clients]
