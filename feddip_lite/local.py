"""What a client does: `local_update`, THE inner loop, and `evaluate`.

Error feedback (slides, Eq. 1-2) is one line here: the gradient is taken at the masked weights w*m and applied to the
dense w, so pruned weights keep moving and may come back. Multiplying by the mask *inside* autograd would mask the
gradient and silently remove that feedback; so the model's parameters *are* w*m (a masked leaf), and the mask never
enters the graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from .data import Dataset, augment, normalise
from .layout import FlatModel
from .models import Dropout
from .seeds import torch_generator

if TYPE_CHECKING:
    from .config import Config

EVALUATION_BATCH = 128  # small batches stay in cache: LeNet-5 on two cores took 1.6 times as long with 1000 at a time


@dataclass(frozen=True)
class LocalPlan:
    """How one client trains in one round; made by `Method.plan` from what the client holds.

    Attributes:
        weights: (n,) float32, where training starts.
        mask: (P,) bool, or None for a dense model. Gradients are taken at w * mask.
        buffers: BatchNorm statistics to start from, (b,) float32.
        add_gradient_: called as `add_gradient_(gradient, masked, dense)`, all (n,); adds the gradient of a penalty or
            a proximal term to the first argument in place.
        project: apply the mask to w after every step (masked SGD), which removes error feedback.
        epochs: passes over the client's data; None = the configuration's `local_epochs`.
    """

    weights: Tensor
    mask: Tensor | None = None
    buffers: Tensor | None = None
    add_gradient_: Callable[[Tensor, Tensor, Tensor], None] | None = None
    project: bool = False
    epochs: int | None = None


@dataclass(frozen=True)
class LocalResult:
    """What training left: dense `weights` (n,), BatchNorm `buffers` (b,), the plan's `mask`, the number of training
    `samples`, and `loss`, the mean masked cross-entropy over all samples of all epochs, without penalty."""

    weights: Tensor
    buffers: Tensor
    mask: Tensor | None
    samples: int
    loss: float


class Diverged(ValueError):
    """A loss, a reply or a metric became NaN or infinite; the message names the last finite loss."""


def local_update(
    model: FlatModel, plan: LocalPlan, data: Dataset, indices: Tensor, config: Config, t: int, client: int
) -> LocalResult:
    """Train on `indices` of the training set for one round: per batch b

        g = grad loss(w*m; b) + extra(w*m, w),      w <- w - lr_t * (g + weight_decay * w)

    and then, if the plan says `project`, w <- w*m.

    Args:
        model: scratch space; its weights, statistics and mode are overwritten. Nothing else is changed.
        indices: (k,) int64, this client's training samples.
        t, client: address of this client's random draws.

    Raises:
        Diverged: the loss or the weights became non-finite.
        TimeoutError: `config.client_timeout` seconds have passed.

    Source: slides, Eq. 1-2; published code `client.py:train_model`, without its second forward pass (D12).
    """
    w = plan.weights.clone()
    mask = None if plan.mask is None else plan.mask.to(w.dtype)
    prunable = model.layout.prunable
    lr = config.lr_at(t)
    deadline = time.monotonic() + (config.client_timeout or float("inf"))
    epochs = config.local_epochs if plan.epochs is None else plan.epochs
    model.load(w, mask, plan.buffers)
    model.module.train()
    losses, sizes = [], []
    for images, labels in _batches(model, data, indices, epochs, config, t, client):
        if time.monotonic() > deadline:
            raise TimeoutError(f"local training took longer than client_timeout = {config.client_timeout} s")
        model.load(w, mask)
        losses.append(_loss_and_gradient(model, images, labels, config.precision))
        sizes.append(len(labels))
        if plan.add_gradient_ is not None:
            plan.add_gradient_(model.gradient, model.weights, w)
        w.mul_(1 - lr * config.weight_decay).add_(model.gradient, alpha=-lr)
        if plan.project and mask is not None:
            w[:prunable].mul_(mask)
    loss = _mean_loss(losses, sizes, w)
    return LocalResult(w, model.buffers.clone(), plan.mask, len(indices), loss)


def _loss_and_gradient(model: FlatModel, images: Tensor, labels: Tensor, precision: str) -> Tensor:
    """Cross-entropy at `model.weights`; its gradient is left in `model.gradient`. Returns the loss, a scalar tensor."""
    model.gradient.zero_()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        loss = F.cross_entropy(model.module(images), labels)
    loss.backward()
    return loss.detach()


def _batches(
    model: FlatModel, data: Dataset, indices: Tensor, epochs: int, config: Config, t: int, client: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised batches of `epochs` shuffled passes; the last batch of a pass may be short."""
    shuffle = torch_generator(config.seed, "shuffle", t, client)
    crop = torch_generator(config.seed, "augment", t, client)
    for layer in model.module.modules():
        if isinstance(layer, Dropout):
            layer.generator = torch_generator(config.seed, "dropout", t, client, device=model.weights.device)
    for _ in range(epochs):
        order = torch.randperm(len(indices), generator=shuffle)
        for batch in indices[order.to(indices.device)].split(config.batch_size):
            images = augment(data.train_images[batch], data.augmentation, crop)
            yield normalise(images, data), data.train_labels[batch]


def _mean_loss(losses: list[Tensor], sizes: list[int], weights: Tensor) -> float:
    """Mean over samples, in float64; the one place where the device is waited for."""
    if not losses:
        return float("nan")
    each = torch.stack(losses).double().cpu()
    finite = each[each.isfinite()]
    if len(finite) < len(each) or not weights.isfinite().all():
        last = f"{finite[-1]:.4g}" if len(finite) else "none in this round"
        raise Diverged(f"training diverged in step {len(finite) + 1} of {len(each)}; last finite loss: {last}")
    return float(each @ torch.tensor(sizes, dtype=torch.float64) / sum(sizes))


@dataclass(frozen=True)
class Evaluation:
    """Per test sample: cross-entropy `losses` (k,) float32 and `ranks` (k,) int64, the number of classes scored above
    the true one (0 = correct; equal scores rank by class index)."""

    losses: Tensor
    ranks: Tensor


def evaluate(
    model: FlatModel, weights: Tensor, mask: Tensor, buffers: Tensor, data: Dataset, indices: Tensor
) -> Evaluation:
    """Evaluate the sparse model w*m on `indices` of the test set, in evaluation mode."""
    model.load(weights, mask, buffers)
    model.module.eval()
    losses, ranks = [], []
    with torch.inference_mode():
        for batch in indices.split(EVALUATION_BATCH):
            labels = data.test_labels[batch][:, None]
            logits = model.module(normalise(data.test_images[batch], data))
            losses.append(F.cross_entropy(logits, labels[:, 0], reduction="none"))
            true = logits.gather(1, labels)
            earlier = torch.arange(logits.shape[1], device=logits.device) < labels
            ranks.append(((logits > true) | ((logits == true) & earlier)).sum(1))
    return Evaluation(torch.cat(losses), torch.cat(ranks))
