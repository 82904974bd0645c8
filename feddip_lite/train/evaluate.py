"""The sparse global model on the test set."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.cache import once_per_tensor
from ..core.errors import Diverged
from ..core.flat import FlatModel
from ..core.state import ServerState
from ..data.datasets import Dataset, normalise
from .round import Clients

# Test samples per job; fixed, so that the bits do not depend on the number of workers. A GPU takes a quarter of the
# usual 10 000 at once, so that all chunks have one shape, and one recording.
EVALUATION_CHUNK = {"cpu": 1024, "cuda": 2500}
EVALUATION_BATCH = 128  # small batches stay in cache: LeNet-5 on two cores took 1.6 times as long with 1000 at a time


def evaluate(
    model: FlatModel, weights: Tensor, mask: Tensor, buffers: Tensor, data: Dataset, indices: Tensor
) -> tuple[Tensor, Tensor]:
    """Evaluate the sparse model w*m on `indices` (k,) of the test set, in evaluation mode.

    Returns:
        Per sample: cross-entropy (k,) float32 and rank (k,) int64, the number of classes scored above the true one
        (0 = correct; equal scores rank by class index).
    """
    model.load(weights, mask, buffers)
    model.module.eval()
    losses, ranks = [], []
    # A model that draws even here, by F.dropout without `training`, draws the same for the same samples.
    with torch.inference_mode(), model.drawing(seed=0):
        for batch in indices.split(EVALUATION_BATCH if indices.device.type == "cpu" else len(indices)):
            labels = data.test_labels[batch][:, None]
            logits = model.kernels.logits(normalise(data.test_images[batch], data))
            losses.append(F.cross_entropy(logits, labels[:, 0], reduction="none"))
            true = logits.gather(1, labels)
            earlier = torch.arange(logits.shape[1], device=logits.device) < labels
            ranks.append(((logits > true) | ((logits == true) & earlier)).sum(1))
    return torch.cat(losses), torch.cat(ranks)


def _on_cpu(shard: Tensor) -> Tensor:
    return shard if shard.is_cpu else _copied(shard)


@once_per_tensor
def _copied(shard: Tensor) -> Tensor:
    """A client's indices on the CPU; a copy for every client and round would wait for the device as often."""
    return shard.cpu()


def evaluate_state(state: ServerState, clients: Clients) -> dict[str, float]:
    """The sparse global model w*m on the whole test set, in chunks side by side.

    Returns: `accuracy` in [0, 1], mean cross-entropy `loss`, `top5_accuracy`, and `local_accuracy`, the mean over
    clients of the accuracy on their own test shards.

    Raises:
        Diverged: the loss is NaN or infinite.
    """
    everything = torch.arange(len(clients.data.test_labels), device=state.weights.device)
    model = (state.weights, state.mask, state.buffers, clients.data)
    chunks = everything.split(EVALUATION_CHUNK[everything.device.type])
    jobs = [clients.workers.submit(evaluate, *model, chunk) for chunk in chunks]
    losses, ranks = (torch.cat(parts) for parts in zip(*(job.result() for job in jobs), strict=True))
    loss = float(losses.double().mean())
    if not math.isfinite(loss):
        raise Diverged(f"round {state.round - 1}: the global model's test loss is {loss}")
    ranks = ranks.cpu()
    correct = (ranks == 0).double()
    own = [float(correct[_on_cpu(shard)].mean()) for shard in clients.test if len(shard)]
    return {
        "accuracy": float(correct.mean()),
        "top5_accuracy": float((ranks < 5).double().mean()),
        "loss": loss,
        "local_accuracy": sum(own) / len(own),
    }
