"""How local models merge: do the clients of a round move the same way, and is their mean better than they are?

FedSparsify's abstract says that models confined to fewer parameters are easier to align and to merge. It gives no
measure; these two are ours. Read before: `trajectory.py`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from ..config import Config
from ..core.plan import LocalPlan, LocalResult
from ..core.state import EMPTY
from ..methods.base import samples_of, weighted_mean
from ..records.store import HEADLINE_ROWS
from ..train.evaluate import evaluate_state
from ..train.observe import Run
from ..train.round import RoundRecord
from ..train.transport import methods_part, received
from .trajectory import Trajectory, record_trajectory

MEASURES = ("alignment", "members_accuracy", "merging_gain")
"""Columns of a trajectory, of the cohort's local models v_n = w_n * m_n with shares rho_n of its samples, after the
round to come; empty at the end, where none comes. `alignment` of v_n minus where client n started; `members_accuracy`,
the mean of the v_n's; `merging_gain`, the accuracy of their mean minus it, both on the whole test set."""


class Merging(Trajectory):
    """The local models of the rounds that begin with a state that is due."""

    columns = MEASURES

    def round_columns(self, run: Run, record: RoundRecord) -> dict[str, float]:
        exchange, state, t = record.exchange, record.exchange.before, record.round
        layout, device = run.method.layout, state.weights.device
        memories = {client: state.memories.get(client, EMPTY) for client in exchange.results}
        offers = {
            client: received(run.method, exchange.offers[client], device, memory) for client, memory in memories.items()
        }
        plans = [run.method.plan(offer, methods_part(memories[client]), t) for client, offer in offers.items()]
        trained = list(exchange.results.values())
        full = torch.ones_like(state.mask)

        def sparse(each: LocalPlan | LocalResult) -> Tensor:
            return layout.masked(each.weights, full if each.mask is None else each.mask)

        starts, ends = (torch.stack([*map(sparse, models)]) for models in (plans, trained))
        buffers = [result.buffers for result in trained]

        def accuracy(weights: Tensor, buffers: Tensor) -> float:
            model = replace(state, weights=weights, buffers=buffers, mask=full)
            return evaluate_state(model, run.clients)["accuracy"]

        shares = torch.tensor(list(samples_of(exchange.replies).values())).double().to(ends.device)
        shares /= shares.sum()
        members = float(shares.cpu() @ torch.tensor([*map(accuracy, ends, buffers)], dtype=torch.float64))
        merged = accuracy(weighted_mean(ends, exchange.replies), weighted_mean(buffers, exchange.replies))
        aligned = alignment(ends.double() - starts.double(), shares)
        return {"alignment": aligned, "members_accuracy": members, "merging_gain": merged - members}


def record_merging(config: Config, folder: str | Path) -> pd.DataFrame:
    """`record_trajectory` of a `Merging`: T + 1 rows, the columns MEASURES among them."""
    return record_trajectory(config, folder, Merging())


def alignment(moves: Tensor, shares: Tensor) -> float:
    """||sum rho_n d_n||^2 / sum rho_n ||d_n||^2 of `moves` d (K, n) and `shares` rho (K,), which sum to 1; float64.

    In [0, 1]: 1 where all move alike, 1/K for orthogonal moves of one length and equal shares, 0 where they cancel;
    NaN where nobody moves.
    """
    mean = shares @ moves
    return float(mean @ mean / (shares @ moves.square().sum(1)))


def per_run(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per run of `recorded("merging/lite")`: `label`, `split`, `seed`, and the means of MEASURES over its last
    ten observed rounds."""
    if runs.empty:
        return pd.DataFrame(columns=["label", "split", "seed", *MEASURES])
    observed = runs[runs["alignment"].notna()].sort_values("round").groupby("run_id").tail(HEADLINE_ROWS)
    return observed.groupby(["label", "split", "seed"], as_index=False)[list(MEASURES)].mean()
