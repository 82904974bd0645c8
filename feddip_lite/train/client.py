"""What a client does: `local_update`, THE inner loop, and `evaluate`.

Error feedback (slides, Eq. 1-2) is one line here: the gradient is taken at the masked weights w*m and applied to the
dense w, so pruned weights keep moving and may come back. Multiplying by the mask *inside* autograd would mask the
gradient and silently remove that feedback; so the model's parameters *are* w*m (a masked leaf), and the mask never
enters the graph.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice, zip_longest

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import Config
from ..core.flat import FlatModel
from ..core.models import Dropout
from ..core.plan import LocalPlan, LocalResult
from ..core.seeds import derive
from ..data.datasets import Dataset, crop, draw_epochs, normalise

PIECE = 2**17  # weights; four vectors of this length fit into a core's cache


def local_update(
    model: FlatModel, plan: LocalPlan, data: Dataset, indices: Tensor, config: Config, t: int, client: int, phase=0
) -> LocalResult:
    """Train on `indices` of the training set for one round: per batch b

        g = grad loss(w*m; b) + extra(w*m, w),      w <- w - lr_t * (g + weight_decay * w)

    and then, if the plan says `project`, w <- w*m.

    Args:
        model: scratch space; its weights, statistics and mode are overwritten. Nothing else is changed.
        indices: (k,) int64, this client's training samples.
        t, client, phase: address of this client's random draws; phase 1 is a plan's `then`.

    Raises:
        TimeoutError: `config.client_timeout` seconds have passed.

    Source: slides, Eq. 1-2; published code `client.py:train_model`, without its second forward pass (D12).
    """
    model = plan.model or model
    batches = partial(_batches, model, data, indices, config, (t, client, phase) if phase else (t, client))
    deadline = time.monotonic() + (config.client_timeout or float("inf"))
    w = plan.weights.clone()
    mask = None if plan.mask is None else plan.mask.to(w.dtype)
    lr = config.lr_at(t)
    squares = torch.zeros_like(w) if plan.squared_gradients else None
    model.load(w, mask, plan.buffers)
    pieces = _pieces(model, w, mask)
    model.module.train(plan.mode != "score")
    losses, sizes, statistics = [], [], model.buffers.clone() if plan.dense_statistics else None
    for images, labels in batches(plan.passes(config.local_epochs)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"local training took longer than client_timeout = {config.client_timeout} s")
        sizes.append(len(labels))
        if plan.mode != "train":
            with torch.no_grad():
                losses.append(F.cross_entropy(model.kernels.logits(images), labels))
            continue
        losses.append(model.kernels.loss_and_gradient(images, labels))
        if plan.dense_statistics:
            _feed(model, w, images, statistics)
        if squares is not None:
            squares.addcmul_(model.gradient, model.gradient)
        if plan.add_gradient_ is not None:
            plan.add_gradient_(model.gradient, model.weights, w)
        for dense, gradient, masked, m in pieces:
            dense.mul_(1 - lr * config.weight_decay).add_(gradient, alpha=-lr)
            if plan.project and m is not None:
                dense.mul_(m)
            torch.mul(dense, 1.0 if m is None else m, out=masked)
    each, mean = _mean_loss(losses, sizes, w)
    if plan.dense_statistics:
        model.buffers.copy_(statistics)
    result = LocalResult(
        weights=w,
        buffers=model.buffers.clone(),
        mask=plan.mask,
        samples=len(indices),
        losses=each,
        loss=mean,
        squared_gradients=squares,
        client=client,
    )
    if plan.final_gradient is not None:
        last = batches(1, purpose="final gradient")
        result = _with_gradient(result, model, last if plan.final_gradient == "epoch" else islice(last, 1))
    if plan.then is None:
        return result
    return result.followed_by(local_update(model, plan.then(result), data, indices, config, t, client, phase + 1))


def _feed(model: FlatModel, dense: Tensor, images: Tensor, statistics: Tensor) -> None:
    """Update BatchNorm `statistics` by a forward pass at the `dense` weights; a model without any is left alone."""
    if not len(statistics):
        return
    masked = model.weights.clone()
    model.weights.copy_(dense)
    model.buffers.copy_(statistics)
    with torch.no_grad():
        model.kernels.logits(images)
    statistics.copy_(model.buffers)
    model.weights.copy_(masked)


def see_test_images(
    model: FlatModel, plan: LocalPlan, result: LocalResult, data: Dataset, indices: Tensor, config: Config
) -> LocalResult:
    """`result` with BatchNorm statistics that have also seen the test samples `indices` (k,), in their order: what
    testing in training mode before the upload does (D13), at the weights whose statistics the plan takes."""
    if not len(result.buffers):
        return result
    model.load(result.weights, None if plan.dense_statistics else result.mask, result.buffers)
    model.module.train()
    with torch.no_grad():
        for batch in indices.split(config.batch_size):
            model.kernels.logits(normalise(data.test_images[batch], data))
    return replace(result, buffers=model.buffers.clone())


def _pieces(model: FlatModel, w: Tensor, mask: Tensor | None) -> list[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Views (dense weights, gradient, masked weights, mask or None) that together cover the vectors.

    On a CPU they are short: the few operations of a step then meet each piece in the cache, and millions of weights
    come from memory once instead of five times.
    """
    length = PIECE if w.device.type == "cpu" else len(w)
    masks = () if mask is None else mask.split(length)
    prunable = sum(map(len, masks))
    vectors = [v[:prunable].split(length) + v[prunable:].split(length) for v in (w, model.gradient, model.weights)]
    return list(zip_longest(*vectors, masks))


def _mean_loss(losses: list[Tensor], sizes: list[int], weights: Tensor) -> tuple[Tensor, Tensor]:
    """(losses (steps,), their mean over samples in float64), on the device of `weights`; NaN without any."""
    if not losses:
        return weights.new_zeros(0), weights.new_full((), float("nan"), dtype=torch.float64)
    each, counts = torch.stack(losses), torch.tensor(sizes, dtype=torch.float64)
    return each, each.double() @ counts.to(weights.device, non_blocking=True) / sum(sizes)


def _with_gradient(result: LocalResult, model: FlatModel, batches: Iterator) -> LocalResult:
    """`result` with the mean gradient over the samples of `batches`; and their losses, if nothing was trained."""
    total, losses, sizes = torch.zeros_like(model.gradient), [], []
    for images, labels in batches:
        losses.append(model.kernels.loss_and_gradient(images, labels))
        sizes.append(len(labels))
        total.add_(model.gradient, alpha=len(labels))
    result = replace(result, gradient=total.div_(sum(sizes)))
    if len(result.losses):
        return result
    each, loss = _mean_loss(losses, sizes, total)
    return replace(result, losses=each, loss=loss)


def _batches(
    model: FlatModel, data: Dataset, indices: Tensor, config: Config, address: tuple, epochs: int, purpose="shuffle"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised batches of `epochs` shuffled passes; the last batch of a pass may be short."""
    for layer in model.module.modules():
        if isinstance(layer, Dropout):
            layer.generator.manual_seed(derive(config.seed, "dropout", *address))
    if not epochs:
        return
    draws = draw_epochs(data, len(indices), epochs, config.seed, address, purpose)
    draws = draws.to(indices.device, non_blocking=True)  # the whole round's in one transfer
    with model.drawing(derive(config.seed, "random layers", *address)):
        for epoch in draws:
            model.pause()
            for order, *crops in zip(*(draw.split(config.batch_size) for draw in epoch), strict=True):
                batch = indices[order]
                images = data.train_images[batch]
                for choice in crops:
                    images = crop(images, data.augmentation, choice)
                yield normalise(images, data), data.train_labels[batch]
