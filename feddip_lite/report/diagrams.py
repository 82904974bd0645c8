"""Drawings that explain the ideas: the workflow, pruning, masks, schedules, error feedback, partitions.

They show definitions and small examples, never results of runs (`curves.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from numpy.typing import ArrayLike

from ..core.sparsity import num_kept, topk_mask
from .style import INK, grid, styled

KEPT, PRUNED, BLUE = "#d55e00", "#c9ced3", "#0072b2"
SERVER, CLIENT = "#fdece2", "#e6f1f8"  # fills


@styled
def workflow() -> Figure:
    """One round of FedDIP: what the server does, what travels, what a client does."""
    figure, panel = plt.subplots(figsize=(10.5, 5.6), layout="constrained")
    panel.set(xlim=(0, 105), ylim=(0, 56), aspect="equal")
    panel.set_axis_off()
    server = r"weighted average of the uploads" "\n" r"every $R$ rounds a new mask $m$: keep the largest $|w|$"
    _box(panel, 27, 42, 51, 13, "Server", server + "\n" r"sparsity $s_t$ grows from $s_0$ to $s_p$", SERVER)
    client = "gradient at the sparse  $w \\odot m$\nstep on the dense  $w$:  error feedback\n"
    client += r"growing penalty  $\lambda_t\,\Sigma_\ell\,\Vert w_\ell \odot m_\ell \Vert_2$"
    for name, left in (("Client 1", 1), ("Client 2", 37), ("Client K", 73)):
        _box(panel, left, 1, 31, 13, name, client, CLIENT)
        low = left + 15.5
        high = 52.5 + (low - 52.5) * 0.45
        _arrow(panel, (high - 2.6, 41.4), (low - 1, 14.8), KEPT)
        _arrow(panel, (low + 4, 14.8), (high + 2.6, 41.4), BLUE)
    panel.text(70.5, 7, r"$\cdots$", ha="center", va="center", fontsize=15, color=INK)
    sparse = np.random.default_rng(3).random((5, 5)) < 0.3
    _packet(panel, 1, 29, sparse, "1  sparse download", "kept weights\nand mask bits", KEPT)
    _packet(panel, 84, 29, np.ones((5, 5), bool), "3  dense upload", "every weight,\npruned or not", BLUE)
    for place, text in (((1, 16.2), "2  train locally"), ((1, 52.3), "4  average, prune, repeat")):
        panel.text(*place, text, color=INK, weight="bold", fontsize=11)
    return figure


def _box(
    panel: Axes, left: float, bottom: float, width: float, height: float, title: str, text: str, fill: str
) -> None:
    shape = "round,pad=0,rounding_size=1.6"
    panel.add_patch(FancyBboxPatch((left, bottom), width, height, boxstyle=shape, fc=fill, ec=INK, lw=1.1))
    middle, top = left + width / 2, bottom + height
    panel.text(middle, top - 1.2, title, ha="center", va="top", weight="bold", fontsize=11.5, color=INK)
    panel.text(middle, top - 4.3, text, ha="center", va="top", fontsize=9.5, linespacing=1.5, color=INK)


def _arrow(panel: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    look = {"arrowstyle": "-|>", "mutation_scale": 15, "lw": 2, "shrinkA": 0, "shrinkB": 0}
    panel.add_patch(FancyArrowPatch(start, end, color=colour, **look))


def _packet(panel: Axes, left: float, bottom: float, filled: np.ndarray, head: str, text: str, colour: str) -> None:
    """A message: a little matrix whose filled cells travel, and its name."""
    for (row, column), full in np.ndenumerate(filled):
        cell = (left + 1.3 * column, bottom + 1.3 * row)
        panel.add_patch(Rectangle(cell, 1.3, 1.3, fc=colour if full else "white", ec=INK, lw=0.5))
    panel.text(left, bottom + 8, head, color=colour, weight="bold", fontsize=11)
    panel.text(left + 7.8, bottom + 3.3, text, color=colour, fontsize=9.5, va="center")


@styled
def before_after_pruning(sizes: Sequence[int] = (5, 6, 6, 3), sparsity: float = 0.7, seed: int = 1) -> Figure:
    """A small network of random weights before and after global magnitude pruning; `sizes` are neurons per layer."""
    shapes = list(zip(sizes[1:], sizes[:-1], strict=True))
    weights = torch.randn(sum(map(prod, shapes)), generator=torch.Generator().manual_seed(seed)).abs()
    mask = topk_mask(weights, num_kept(sparsity, len(weights)))
    heights = [np.linspace(-1, 1, size) * size / max(sizes) for size in sizes]
    edges = [(layer, i, j) for layer, (rows, columns) in enumerate(shapes) for i in range(rows) for j in range(columns)]
    figure, axes = grid(1, 2, 3.2)
    for panel, after in zip(axes[0], (False, True), strict=True):
        for (layer, i, j), weight, kept in zip(edges, weights.tolist(), mask.tolist(), strict=True):
            look = {"color": KEPT, "lw": 1.5 * weight} if kept or not after else {"color": PRUNED, "lw": 0.5, "ls": ":"}
            panel.plot([layer, layer + 1], [heights[layer][j], heights[layer + 1][i]], zorder=1, **look)
        for layer, places in enumerate(heights):
            panel.scatter(np.full(len(places), layer), places, s=150, color="white", edgecolor=INK, zorder=2)
        kept = int(mask.sum()) if after else len(weights)
        panel.set_title(f"{'after' if after else 'before'} pruning: {kept} of {len(weights)} weights")
        panel.set_axis_off()
    return figure


@styled
def matrices(panels: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> Figure:
    """Small matrices with their numbers; pruned entries (mask False) are grey. Values: {title: (matrix, mask)}, arrays
    or tensors on the CPU."""
    panels = {title: (np.asarray(matrix), np.asarray(mask)) for title, (matrix, mask) in panels.items()}
    figure, axes = grid(1, len(panels), 2.6, 2.9 * len(panels))
    colours = LinearSegmentedColormap.from_list("weights", ["#56b4e9", "#ffffff", "#e69f00"])
    largest = max(float(np.abs(matrix).max()) for matrix, _ in panels.values())
    for panel, (title, (matrix, mask)) in zip(axes[0], panels.items(), strict=True):
        for kept, colour in ((mask, INK), (~mask, "#69727b")):
            numbers = {"annot": matrix + 0.0, "fmt": "z.2f", "annot_kws": {"fontsize": 8, "color": colour}}
            look = {"cmap": colours if colour == INK else ["#eef0f2"], "cbar": False, "square": True}
            sns.heatmap(matrix, mask=~kept, vmin=-largest, vmax=largest, ax=panel, **numbers, **look)
        panel.set(title=title, xticks=[], yticks=[])
    return figure
