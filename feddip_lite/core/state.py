"""`ServerState`: all that is carried from one round to the next, the clients' memories included."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor

Memory = Mapping[str, Tensor]
"""A method's own named tensors, on the server or at a client."""

EMPTY: Memory = MappingProxyType({})


@dataclass(frozen=True)
class ServerState:
    """What is there before round `round`.

    Attributes:
        weights: (n,) float32, the dense w. The sparse global model is w * mask.
        buffers: BatchNorm running statistics (b,) float32.
        mask: (P,) bool, True = kept.
        memory: the method's own named tensors.
        memories: the clients' own, by client id; of a client that is elsewhere, what tells which memory it holds.
        estimates: what the server believes of each client's change, (n,) by client id, under the feedback "ef21".
        held: the mask that each client holds, packed, by client id, under `mask_cache`.
    """

    round: int
    weights: Tensor
    buffers: Tensor
    mask: Tensor
    memory: Memory = field(default_factory=dict)
    memories: Mapping[int, Memory] = field(default_factory=dict)
    estimates: Mapping[int, Tensor] = field(default_factory=dict)
    held: Mapping[int, Tensor] = field(default_factory=dict)
