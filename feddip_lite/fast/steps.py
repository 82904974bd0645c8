"""The steps of K clients' training, on memory that is laid out once and recorded.

    per step, for K clients:   g = grad loss(w*m; batch) + terms,    w <- w - lr * (g + weight_decay * w),    mask

The weights of K clients lie tensor by tensor in one vector: the K copies of the first tensor, then those of the second,
... So each tensor of all clients is one contiguous block, which a batched operator takes as it is, and a step is a few
operations on the whole vector. A step reads and writes fixed memory only, its number included: on a GPU it is recorded
as a CUDA graph and replayed, and nothing in a round waits for the device. Without a GPU the same function is called.
Read before: `batch_table.py`, `stacked.py`; after: `together.py`, which says whose plans these steps are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import Config
from ..core.flat import FlatModel, Layout, Slot
from ..core.plan import LocalPlan, LocalResult
from ..core.seeds import derive
from ..core.terms import NormTerm, ProximalTerm, SquareTerm, Terms, WithoutPruned
from ..data.datasets import Dataset, crop, normalise
from .batch_table import RAGGED, BatchTable
from .stacked import Padding, StackedDropout, stacked

SPARE_STEPS = 8  # rows that the table has at least: recording runs a step a few times
MOST_SHORT = 2  # sizes of short batches that are recorded: an even split has one or two


@dataclass(frozen=True)
class Kind:
    """What steps of one recording have in common, beside their batch: whether there is a mask, whether weights are
    projected onto it, whether squared gradients are summed, and the types of the terms."""

    masked: bool
    projected: bool
    squares: bool
    terms: tuple[type, ...]


class _Blocks:
    """A vector of K clients' tensors, (K * size,), tensor by tensor; `of[name]` is the block (K, *shape) of one."""

    def __init__(self, slots: Sequence[Slot], clients: int, like: Tensor):
        self.slots = slots
        self.vector = like.new_zeros(clients * slots[-1].stop if slots else 0)
        self.rows = [self.vector[clients * s.start : clients * s.stop].view(clients, -1) for s in slots]
        self.of = {s.name: row.view(clients, *s.shape) for s, row in zip(slots, self.rows, strict=True)}

    def put(self, matrix: Tensor) -> None:
        """Take over the clients' vectors, (K, size)."""
        for slot, row in zip(self.slots, self.rows, strict=True):
            row.copy_(matrix[:, slot.start : slot.stop])

    def matrix(self, clients: int) -> Tensor:
        """The clients' vectors, (K, size), new."""
        return torch.cat(self.rows, 1) if self.rows else self.vector.new_empty(clients, 0)


@dataclass(frozen=True)
class _Twin:
    """A module for the clients `part`, its parameters, where their gradients belong, and its dropout layers."""

    module: nn.Module
    leaves: list[Tensor]
    gradients: list[Tensor]
    part: slice
    dropouts: list[StackedDropout]


class Stack:
    """The memory of K clients' training, and the steps on it."""

    def __init__(self, model: FlatModel, clients: int, config: Config, record: Callable, grouped: bool):
        layout, like = model.layout, model.weights
        self.layout, self.clients, self.config, self.record = layout, clients, config, record
        self.device, self.dtype, self.prunable = like.device, like.dtype, clients * layout.prunable
        self.weights = _Blocks(layout.slots, clients, like)  # w*m, at which gradients are taken
        self.gradient = _Blocks(layout.slots, clients, like)
        self.dense = _Blocks(layout.prunable_slots, clients, like)  # w, where it is not w*m
        self.mask = _Blocks(layout.prunable_slots, clients, like)
        self.buffers = _Blocks(layout.buffer_slots, clients, like)
        self.centre = self.squares = None  # made when a plan asks for them
        self.padding = Padding()
        parts = [slice(0, clients)] if grouped else [slice(k, k + 1) for k in range(clients)]
        self.twins = [self._twin(model.module, part) for part in parts]
        self.counter = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.scalars = like.new_zeros(1 + MOST_TERMS, clients, 1)  # learning rate, then the strength of each term
        self.epochs, self.data, self.shards = 0, None, None
        self.recordings: dict[tuple[Kind, int], Callable[[], object]] = {}

    def _twin(self, module: nn.Module, part: slice) -> _Twin:
        leaves = {name: block[part].detach().requires_grad_() for name, block in self.weights.of.items()}
        buffers = {name: block[part] for name, block in self.buffers.of.items()}
        twin = stacked(module, part.stop - part.start, leaves, buffers, self.padding)
        return _Twin(
            module=twin,
            leaves=list(leaves.values()),
            gradients=[block[part] for block in self.gradient.of.values()],
            part=part,
            dropouts=[layer for layer in twin.modules() if isinstance(layer, StackedDropout)],
        )

    def train(
        self, kind: Kind, plans: Mapping[int, LocalPlan], data: Dataset, shards: Sequence[Tensor], t: int
    ) -> dict[int, LocalResult]:
        """The results of K plans of one kind, by client id."""
        self._make_room(kind, max(plan.passes(self.config.local_epochs) for plan in plans.values()), data, shards)
        table = BatchTable.drawn(plans, data, shards, self.config, t, self.batch)
        step_sizes = table.step_sizes(self.exact)
        for size in sorted(set(step_sizes)):
            if (kind, size) not in self.recordings:
                self.counter.zero_()
                self.recordings[kind, size] = self.record(partial(self._step, kind, size), [])[1]
        self._load(kind, plans, table, shards, t)  # now, since recording has left rubbish everywhere
        for size, each in zip(step_sizes, table.sizes.tolist(), strict=True):
            self._draw_dropout(each)
            self.recordings[kind, size]()
        return self._results(kind, plans, table, shards)

    def _make_room(self, kind: Kind, epochs: int, data: Dataset, shards: Sequence[Tensor]) -> None:
        """Memory for the largest client. What was recorded on other memory, or for other data, is forgotten."""
        if kind.squares and self.squares is None:
            self.squares = _Blocks(self.layout.slots, self.clients, self.weights.vector)
        if ProximalTerm in kind.terms and self.centre is None:
            self.centre = _Blocks(self.layout.slots, self.clients, self.weights.vector)
        if epochs <= self.epochs and data is self.data and shards is self.shards:
            return
        self.recordings.clear()
        self.epochs, self.data, self.shards = epochs, data, shards
        lengths = {len(shard) for shard in shards}
        self.batch = min(self.config.batch_size, max(lengths))
        short = {length % self.batch for length in lengths} - {0}
        self.exact = {self.batch} | (short if len(short) <= MOST_SHORT else set())
        steps = epochs * -(-max(lengths) // self.batch)
        shape = (max(steps, SPARE_STEPS), self.clients, self.batch)
        self.samples = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.crops = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.sizes = torch.zeros(shape[:2], dtype=self.dtype, device=self.device)
        self.losses = torch.zeros(shape[:2], dtype=self.dtype, device=self.device)
        self._try_out()

    def _try_out(self) -> None:
        """Ask dropout layers for their shape, by a pass that changes nothing but statistics."""
        self.padding.valid = None
        self.counter.zero_()
        for twin in self.twins:
            for layer in twin.dropouts:
                layer.keep = None
            if twin.dropouts:
                with torch.no_grad():
                    twin.module(self._images(1)[:, twin.part].flatten(1, 2))
            for layer in twin.dropouts:
                shape = (layer.clients, self.batch, layer.features)
                layer.keep = torch.zeros(shape, dtype=self._drawn_dtype, device=self.device)

    def _load(
        self, kind: Kind, plans: Mapping[int, LocalPlan], table: BatchTable, shards: Sequence[Tensor], t: int
    ) -> None:
        """What a round starts from."""
        steps, samples = len(table.sizes), self._here(table.samples)
        for k, client in enumerate(plans):
            self.samples[:steps, k] = shards[client][samples[:, k]]
        if table.crops is not None:
            self.crops[:steps] = self._here(table.crops)
        self.sizes[:steps] = self._here(table.sizes)
        numbers = [
            [self.config.lr_at(t), *(getattr(term, "strength", 0.0) for term in terms_of(plan))]
            for plan in plans.values()
        ]
        self.scalars[: len(numbers[0]), :, 0] = self._here(torch.tensor(numbers, dtype=self.dtype).t().contiguous())
        self.counter.zero_()
        start = torch.stack([plan.weights for plan in plans.values()])
        self.weights.put(start)
        if kind.masked:
            self.dense.put(start)
            self.mask.put(torch.stack([plan.mask for plan in plans.values()]))
            torch.mul(self.dense.vector, self.mask.vector, out=self.weights.vector[: self.prunable])
        if ProximalTerm in kind.terms:
            self.centre.put(start)
        if kind.squares:
            self.squares.vector.zero_()
        if self.layout.buffer_size:
            self.buffers.put(torch.stack([plan.buffers for plan in plans.values()]))
        for twin in self.twins:
            for layer in twin.dropouts:
                for client, generator in zip([*plans][twin.part], layer.generators, strict=True):
                    generator.manual_seed(derive(self.config.seed, "dropout", t, client))

    def _draw_dropout(self, sizes: list[int]) -> None:
        """Dropout's draws for the next step. Not recorded, so that a short batch draws as many as it does alone."""
        for twin in self.twins:
            for layer in twin.dropouts:
                layer.draw_(sizes[twin.part], self._drawn_dtype)

    def _step(self, kind: Kind, size: int) -> None:
        """One step of all clients."""
        ragged, size = size == RAGGED, self.batch if size == RAGGED else size
        images, labels = self._images(size), self._labels(size)
        sizes = self.sizes.index_select(0, self.counter)[0]  # (K,)
        valid = (torch.arange(size, device=self.device)[:, None] < sizes).to(self.dtype) if ragged else None
        losses = []
        for twin in self.twins:
            part = twin.part
            self.padding.valid, self.padding.sizes = (valid[:, part], sizes[part]) if ragged else (None, None)
            with self._autocast():
                logits = twin.module(images[:, part].flatten(1, 2))  # (clients of the twin, b, classes)
                each = F.cross_entropy(logits.flatten(0, 1), labels[:, part].t().flatten(), reduction="none")
            each = each.view(-1, size)
            loss = (each * valid[:, part].t()).sum(1) / sizes[part].clamp_min(1) if ragged else each.mean(1)
            torch._foreach_copy_(twin.gradients, torch.autograd.grad(loss.sum(), twin.leaves))
            losses.append(loss.detach())
        with torch.no_grad():
            self.losses.index_copy_(0, self.counter, torch.cat(losses)[None])
            self._update(kind, (sizes > 0)[:, None] if ragged else None)
            self.counter.add_(1)

    def _update(self, kind: Kind, active: Tensor | None) -> None:
        """Terms, weight decay, step and mask; clients that are not `active` (K, 1) stand still."""
        gradient, weights, p = self.gradient.vector, self.weights.vector, self.prunable
        if kind.squares:
            self.squares.vector.addcmul_(gradient, gradient)
        for number, term in enumerate(kind.terms, 1):
            _ADD[term](self, kind, self.scalars[number])
        decay, rate = self.config.weight_decay, self.scalars[0]
        if active is None:
            dense = self.dense.vector if _apart(kind) else weights[:p]
            _descend_([dense, weights[p:]], [gradient[:p], gradient[p:]], rate[0, 0], decay)
        else:
            for row, slope in zip(self.dense_rows(kind), self.gradient.rows, strict=True):
                row.copy_(torch.where(active, row.addcmul(slope.add_(row, alpha=decay), -rate), row))
        if kind.projected:
            weights[:p].mul_(self.mask.vector)
        elif kind.masked:
            torch.mul(self.dense.vector, self.mask.vector, out=weights[:p])

    def dense_rows(self, kind: Kind) -> list[Tensor]:
        """The dense w, (K, size) of each tensor. It has memory of its own only where it differs from w*m."""
        if not _apart(kind):
            return self.weights.rows
        return self.dense.rows + self.weights.rows[self.layout.num_prunable :]

    def _results(
        self, kind: Kind, plans: Mapping[int, LocalPlan], table: BatchTable, shards: Sequence[Tensor]
    ) -> dict[int, LocalResult]:
        steps = len(table.sizes)
        weights, buffers = torch.cat(self.dense_rows(kind), 1), self.buffers.matrix(self.clients)
        losses, sizes = self.losses[:steps].t().contiguous(), self.sizes[:steps].t().double()
        means = (losses.double() * sizes).sum(1) / sizes.sum(1)
        squares = self.squares.matrix(self.clients) if kind.squares else None
        counts = (table.sizes > 0).sum(0).tolist()
        return {
            client: LocalResult(
                weights=weights[k],
                buffers=buffers[k],
                mask=plan.mask,
                samples=len(shards[client]),
                losses=losses[k, : counts[k]],
                loss=means[k],
                squared_gradients=None if squares is None else squares[k],
                client=client,
            )
            for k, (client, plan) in enumerate(plans.items())
        }

    def _images(self, size: int) -> Tensor:
        """The step's images, (size, K, C, H, W), normalised."""
        chosen = self._row(self.samples, size)
        images = self.data.train_images.index_select(0, chosen.flatten())
        if self.data.augmentation is not None:
            images = crop(images, self.data.augmentation, self._row(self.crops, size).flatten())
        return normalise(images, self.data).to(self.dtype).unflatten(0, chosen.shape)

    def _labels(self, size: int) -> Tensor:
        """The step's labels, (size, K)."""
        chosen = self._row(self.samples, size)
        return self.data.train_labels.index_select(0, chosen.flatten()).view(chosen.shape)

    def _row(self, table: Tensor, size: int) -> Tensor:
        """The step's row of a table, (size, K)."""
        return table.index_select(0, self.counter)[0, :, :size].t()

    def _here(self, tensor: Tensor) -> Tensor:
        """A tensor of the CPU on the device, which is not waited for."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    @property
    def _drawn_dtype(self) -> torch.dtype:
        """Dropout draws in the type of what it is applied to."""
        return torch.bfloat16 if self.config.precision == "bf16" else self.dtype

    def _autocast(self):
        enabled = self.config.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


def _apart(kind: Kind) -> bool:
    """Whether w has values that w*m has not."""
    return kind.masked and not kind.projected


def _descend_(vectors: list[Tensor], gradients: list[Tensor], rate: Tensor, decay: float) -> None:
    """w <- w - rate * (g + decay * w), in one pass over the vectors where there is an operator for it. `rate` is ()."""
    if hasattr(torch, "_fused_sgd_") and rate.dtype == torch.float32:  # which it takes a rate on the device for
        none = {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "maximize": False, "is_first_step": False}
        torch._fused_sgd_(vectors, gradients, [], weight_decay=decay, lr=rate, **none)
        return
    for vector, gradient in zip(vectors, gradients, strict=True):
        vector.addcmul_(gradient.add_(vector, alpha=decay), -rate)


def _add_norms(stack: Stack, kind: Kind, strength: Tensor) -> None:
    rows = stack.weights.rows[: stack.layout.num_prunable]
    norms = torch.cat([torch.linalg.vector_norm(row, dim=1, keepdim=True) for row in rows], 1)
    limits = torch.finfo(norms.dtype)
    factors = (strength / norms.clamp_min(limits.tiny)).clamp_max(limits.max)
    for number, (slope, row) in enumerate(zip(stack.gradient.rows, rows, strict=False)):
        slope.addcmul_(row, factors[:, number, None])


def _add_squares(stack: Stack, kind: Kind, strength: Tensor) -> None:
    for slope, row in zip(stack.gradient.rows, stack.weights.rows[: stack.layout.num_prunable], strict=False):
        slope.addcmul_(row, strength)


def _add_proximal(stack: Stack, kind: Kind, strength: Tensor) -> None:
    for slope, row, centre in zip(stack.gradient.rows, stack.dense_rows(kind), stack.centre.rows, strict=True):
        slope.addcmul_(row - centre, strength)


def _drop_pruned(stack: Stack, kind: Kind, strength: Tensor) -> None:
    stack.gradient.vector[: stack.prunable].mul_(stack.mask.vector)


_ADD = {NormTerm: _add_norms, SquareTerm: _add_squares, ProximalTerm: _add_proximal, WithoutPruned: _drop_pruned}
MOST_TERMS = len(_ADD)


def terms_of(plan: LocalPlan) -> tuple:
    """What a plan adds to the gradient, one after the other."""
    added = plan.add_gradient_
    return () if added is None else added.parts if isinstance(added, Terms) else (added,)


def is_known(term: object, plan: LocalPlan, layout: Layout) -> bool:
    """Whether a term can be added here, of the plan's own start, mask and layout as far as it has any."""
    if type(term) not in _ADD or getattr(term, "layout", layout) != layout:
        return False
    return getattr(term, "centre", plan.weights) is plan.weights and getattr(term, "mask", plan.mask) is plan.mask
