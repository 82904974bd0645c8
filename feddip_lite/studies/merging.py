"""How local models merge: do the clients of a round move the same way, and is their mean better than they are?

FedSparsify's abstract says that models confined to fewer parameters are easier to align and to merge. It gives no
measure; these two are ours. Read before: `followed.py`, `train/round.py`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from ..config import Config
from ..core.state import ServerState
from ..methods.base import samples_of, weighted_mean
from ..methods.registry import Method
from ..records.names import labels, splits
from ..records.store import HEADLINE_ROWS
from ..report.statistics import quantity
from ..studies import followed
from ..train.evaluate import evaluate_state
from ..train.failures import collect
from ..train.round import Clients, sample_cohort

MEASURES = ("alignment", "members_accuracy", "merging_gain")
"""Columns of a followed run, of the cohort's local models v_n = w_n * m_n with shares rho_n of its samples, after the
round to come; empty at the end, where none comes. `alignment` of v_n minus where client n started; `members_accuracy`,
the mean of the v_n's; `merging_gain`, the accuracy of their mean minus it, both on the whole test set."""


def follow(config: Config, folder: str | Path) -> pd.DataFrame:
    """`followed.follow`, with local models for an observer: T + 1 rows, the columns MEASURES among them."""
    return followed.follow(config, folder, _observe, MEASURES)


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


def merging_table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per method and partition of `per_run`, with the spread over seeds."""
    rows = []
    for split in splits(runs):
        group = runs[runs["split"] == split]
        for label in labels(group):
            own = group[group["label"] == label]
            row = {"method": label, "partition": split, "alignment": quantity(own["alignment"])}
            row |= {"mean accuracy of local models": quantity(own["members_accuracy"])}
            rows.append(row | {"accuracy of their mean, minus that": quantity(own["merging_gain"], sign="+")})
    return pd.DataFrame(rows)


def _observe(state: ServerState, clients: Clients, method: Method, config: Config, due: bool) -> dict[str, float]:
    t = state.round
    if not due or t == config.rounds:
        return {}
    offers = {client: method.offer(state, t, client) for client in sample_cohort(config, t)}
    jobs = clients.deliver(method, offers, config, t)
    replies, _, _ = collect(jobs, clients.workers, state, config)
    if not replies:  # the round itself says so
        return {}
    plans = [method.plan(offers[client], clients.memories.get(client, {}), t) for client in replies]
    trained = [jobs[client].result()[2] for client in replies]
    starts, ends = (torch.stack([_sparse(each.weights, each.mask) for each in them]) for them in (plans, trained))
    buffers = [result.buffers for result in trained]

    def accuracy(weights: Tensor, buffers: Tensor) -> float:
        model = replace(state, weights=weights, buffers=buffers, mask=torch.ones_like(state.mask))
        return evaluate_state(model, clients)["accuracy"]

    shares = torch.tensor(list(samples_of(replies).values())).double().to(ends.device)
    shares /= shares.sum()
    members = float(shares.cpu() @ torch.tensor([*map(accuracy, ends, buffers)], dtype=torch.float64))
    merged = accuracy(weighted_mean(ends, replies), weighted_mean(buffers, replies))
    aligned = alignment(ends.double() - starts.double(), shares)
    return {"alignment": aligned, "members_accuracy": members, "merging_gain": merged - members}


def _sparse(weights: Tensor, mask: Tensor | None) -> Tensor:
    """w * m, a new vector (n,)."""
    sparse = weights.clone()
    if mask is not None:
        sparse[: len(mask)] *= mask
    return sparse
