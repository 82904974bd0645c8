"""Does magnitude rank weights as the loss's second order does? Measured at the models that recorded runs left.

Removing weight i from a minimum costs about w_i^2 H_ii / 2 (the saliency of optimal brain damage), H the Hessian of the
training loss. Magnitude pruning takes w_i^2 for it. `agreement` says how alike the two order the weights that are left.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from ..core.models import build_model
from ..core.seeds import torch_generator
from ..core.sparsity import jaccard, topk_mask
from ..data.datasets import Dataset, normalise
from ..records.kept_model import KeptModel
from ..report import style
from ..report.style import styled

RECORD = "second_order.json"
PIECE = 50  # samples whose Jacobians are held at once


def hessian_diagonal(module: nn.Module, weights: Mapping[str, Tensor], images: Tensor) -> dict[str, Tensor]:
    """The diagonal of the Hessian of the mean cross-entropy over `images` (b, C, H, W): float64, by tensor.

    Exact, where each logit is piecewise linear in each single weight, as with ReLU and pooling: then its own second
    derivative vanishes, and with the softmax p of the logits z, of any label,

        H_ii = mean of sum_c p_c (dz_c/dw_i - sum_k p_k dz_k/dw_i)^2

    So nothing need be drawn: an estimate by random probes z * Hz (Hutchinson's) has the variance
    sum over j != i of H_ij^2, which may hide it.
    """

    def logits(own: Mapping[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(module, dict(own), (image[None],))[0]

    def one(own: Mapping[str, Tensor], image: Tensor) -> dict[str, Tensor]:
        p, slopes = torch.softmax(logits(own, image), 0), jacrev(logits)(own, image)
        means = {name: torch.tensordot(p, slope, 1) for name, slope in slopes.items()}
        return {name: torch.tensordot(p, (slope - means[name]).square(), 1) for name, slope in slopes.items()}

    total = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in weights.items()}
    for piece in images.split(PIECE):
        for name, each in vmap(one, (None, 0))(dict(weights), piece).items():
            total[name] += each.sum(0, dtype=torch.float64) / len(images)
    return total


def diagonals(kept: KeptModel, model: str, width: float, data: Dataset, samples: int, seed: int) -> Tensor:
    """The diagonal of the Hessian (2, P) at a kept model, on each half of `samples` training images drawn by `seed`."""
    built = build_model(model, **data.model_shape, width=width).eval()
    draw = torch_generator(seed, "second order samples")
    order = torch.randperm(len(data.train_labels), generator=draw)[:samples]
    weights = {slot.name: slot.of(kept.weights) for slot in kept.layout.slots}
    halves = [hessian_diagonal(built, weights, normalise(data.train_images[half], data)) for half in order.chunk(2)]
    flat = [torch.cat([half[slot.name].flatten() for slot in kept.layout.prunable_slots]) for half in halves]
    return torch.stack(flat)


def agreement(weights: Tensor, diagonal: Tensor) -> dict[str, float]:
    """How alike w_i^2 and w_i^2 H_ii / 2 order the weights that are not zero: of `weights` (P,), H_ii (2, P) by two
    halves of the samples.

    Returns: `rank_correlation`, Spearman's, with the mean of both; `overlap`, the Jaccard index of the masks that keep
    the upper half by either; `reliability`, the rank correlation of the two halves' saliencies: samples allow no more.
    """
    left = weights != 0
    squares = weights[left].double().square()
    one, other = (squares * each[left] / 2 for each in diagonal)
    saliency, keep = (one + other) / 2, len(squares) // 2
    return {
        "rank_correlation": float(spearmanr(squares, saliency).statistic),
        "overlap": jaccard(topk_mask(squares, keep), topk_mask(saliency, keep)),
        "reliability": float(spearmanr(one, other).statistic),
    }


def read_second_order(folder: Path) -> pd.DataFrame:
    """The rows of the record in `folder`: `run_id`, `label`, `split` (the target sparsity), `seed`, `target_sparsity`,
    `penalty_max`, and what `agreement` gives; empty without one."""
    path, names = folder / RECORD, ["run_id", "label", "split", "seed", "rank_correlation", "overlap", "reliability"]
    return pd.DataFrame(json.loads(path.read_text())["rows"]) if path.exists() else pd.DataFrame(columns=names)


@styled
def second_order(rows: pd.DataFrame, title: str) -> Figure:
    """Rank correlation and overlap by penalty, a line per target sparsity, a point per seed."""
    looks = {name: {"color": c, "marker": m} for name, c, m in zip(sorted(set(rows["split"])), *_LOOKS, strict=False)}
    data = rows.assign(name=rows["split"], peak=rows["penalty_max"].map("{:g}".format))
    order = [f"{peak:g}" for peak in np.sort(rows["penalty_max"].unique())]
    figure, axes = style.grid(1, 2, 3.0)
    for panel, column, words in zip(axes[0], ("rank_correlation", "overlap"), _MEASURES, strict=True):
        style.over_seeds(data, "peak", column, looks, panel, joined=True, order=order)
        panel.set(xlabel=r"peak of the growing penalty $\lambda_{max}$ (0: FedDP)", ylabel=words)
    style.legend(axes[0][0], looks, loc="best")
    style.headed(figure, title, "bars: 95 % intervals over seeds")
    return figure


_LOOKS = (style.BLUE, style.VERMILION, style.GREEN), "osD"
_MEASURES = "rank correlation of $w^2$ and $w^2 H_{ii}/2$", "overlap of the masks that keep half"
