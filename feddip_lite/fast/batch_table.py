"""The batches of a round's clients as one table, so that a step takes its row of it, whatever the clients' sizes.

Clients need not be alike. Where all of them have batches of one size, that may be the size of the step, and there is a
recording for it. All other steps are ragged: of full size, with samples that do not count, and clients that have no
step left stand still. What is done in which way follows from the federation's sizes alone, so a run that was
interrupted goes on to the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import Config
from ..core.plan import LocalPlan
from ..data.datasets import Dataset, draw_epochs

RAGGED = -1
"""In place of a step's size: not all its batches have one."""


@dataclass(frozen=True)
class BatchTable:
    """What K clients see in S steps: `samples` (S, K, b) int64, each a place in the client's own shard; `crops` as
    many, or None; `sizes` (S, K) int64, how many of the b count. All on the CPU."""

    samples: Tensor
    crops: Tensor | None
    sizes: Tensor

    @classmethod
    def drawn(
        cls, plans: Mapping[int, LocalPlan], data: Dataset, shards: Sequence[Tensor], config: Config, t: int, b: int
    ) -> BatchTable:
        """The batches that `local_update` draws for each client, side by side; the rest is zero."""
        tables, sizes = [], []
        for client, plan in plans.items():
            count, epochs = len(shards[client]), plan.passes(config.local_epochs)
            draws = draw_epochs(data, count, epochs, config.seed, (t, client))
            steps = -(-count // b)
            draws = F.pad(draws, (0, steps * b - count)).view(epochs, -1, steps, b).transpose(1, 2)
            tables.append(draws.reshape(epochs * steps, -1, b))
            sizes.append(torch.tensor(([b] * (steps - 1) + [count - b * (steps - 1)]) * epochs))
        table, sizes = (nn.utils.rnn.pad_sequence(each) for each in (tables, sizes))
        return cls(table[:, :, 0], table[:, :, 1] if table.shape[2] > 1 else None, sizes)

    def step_sizes(self, exact: set[int]) -> list[int]:
        """Of each step the size of all its batches, if they have one that is among the `exact`; else RAGGED."""
        same = (self.sizes == self.sizes[:, :1]).all(1)
        return [
            size if alike and size in exact else RAGGED
            for size, alike in zip(self.sizes[:, 0].tolist(), same.tolist(), strict=True)
        ]
