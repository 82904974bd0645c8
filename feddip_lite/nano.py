"""FedDIP on one page, in plain PyTorch: read it from top to bottom, like the paper; then run it.

    python -m feddip_lite.nano            # LeNet-5 on handwritten digits, pruned to a tenth of its weights
    python -m feddip_lite.nano cuda

A model's weights `w` are its tensors by name, BatchNorm's running statistics among them. A mask `m` has a bool tensor
for each prunable one, True = kept; w*m is `masked(w, m)`. FedDP is FedDIP at `penalty_max` 0, and FedAvg is FedDP at
sparsity 0. The package computes the same rounds (tests/test_nano.py) and adds speed, bytes, records, the other methods
and their options. D1, D2, ... are rows of docs/deviations.md.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from .data.datasets import Dataset, augment, load_dataset, normalise
from .data.partition import partition_iid

Tensors = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]  # images, labels


@dataclass(frozen=True)
class Settings:
    """What a run depends on: values for the digits and, in brackets, the authors' where they differ.

    Under the preset "memory" the server keeps its dense weights (D9); under "repo" everything is as in the published
    code: mask, penalty and BatchNorm's statistics, too (D1, D8, D12, D13).
    """

    rounds: int = 20  # T [1000]
    clients: int = 10  # N [50]
    clients_per_round: int = 5  # K
    local_epochs: int = 3  # [5]
    batch_size: int = 16  # [128]
    lr: float = 0.2  # [0.1]
    lr_decay: float = 0.998  # a round
    weight_decay: float = 5e-4
    initial_sparsity: float = 0.5
    target_sparsity: float = 0.9
    mask_interval: int = 5  # R, rounds between two choices of a mask
    penalty_max: float = 1e-3  # lambda_max
    penalty_steps: int = 20  # Q
    preset: str = "paper"
    seed: int = 0


# 1. Masks: which weights are kept


def prunable(net: nn.Module) -> list[str]:
    """Names of the weights of convolutions and linear layers, in order: no biases, no BatchNorm."""
    return [f"{path}.weight" for path, layer in net.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


def masked(w: Tensors, m: Tensors) -> Tensors:
    """w*m, and a copy of what has no mask."""
    return {name: value * m[name] if name in m else value.clone() for name, value in w.items()}


def erk_densities(shapes: Sequence[Sequence[int]], density: float) -> list[float]:
    """Erdos-Renyi-kernel: the share that layer l keeps is proportional to sum(shape_l) / prod(shape_l), and 1 at most;
    all layers together keep `density`, in (0, 1]. Source: Evci et al. 2020 (RigL)."""
    sizes = torch.tensor([math.prod(shape) for shape in shapes], dtype=torch.float64)
    sums = torch.tensor([sum(shape) for shape in shapes], dtype=torch.float64)
    whole = torch.zeros(len(shapes), dtype=torch.bool)
    while True:
        scale = (density * sizes.sum() - sizes[whole].sum()) / sums[~whole].sum()
        densities = torch.where(whole, 1.0, scale * sums / sizes)
        if (densities <= 1).all():
            return densities.tolist()
        whole = densities >= 1  # a layer cannot keep more than all; the others share what is left


def random_mask(w: Tensors, names: Sequence[str], density: float, generator: torch.Generator) -> Tensors:
    """A random mask at ERK densities: exactly round(density_l * size_l) of each tensor, drawn on the CPU."""
    m = {}
    for name, share in zip(names, erk_densities([w[name].shape for name in names], density), strict=True):
        kept = torch.zeros(w[name].numel(), dtype=torch.bool)
        kept[torch.randperm(len(kept), generator=generator)[: round(share * len(kept))]] = True
        m[name] = kept.view(w[name].shape).to(w[name].device)
    return m


def topk_mask(w: Tensors, names: Sequence[str], sparsity: float) -> Tensors:
    """Keep the largest |w| of all P weights of these tensors, all but round(sparsity * P); of equal ones the first."""
    magnitudes = torch.cat([w[name].abs().flatten() for name in names])
    order = magnitudes.sort(descending=True, stable=True).indices
    kept = torch.ones_like(magnitudes, dtype=torch.bool)
    kept[order[len(order) - round(sparsity * len(order)) :]] = False
    parts = kept.split([w[name].numel() for name in names])
    return {name: part.view(w[name].shape) for name, part in zip(names, parts, strict=True)}


# 2. Schedules, of the round t = 0 .. T-1


def sparsity_at(t: int, initial: float, final: float, rounds: int) -> float:
    """Cubic: from `initial` to nearly `final`, most of the way early."""
    return final + (initial - final) * (1 - t / rounds) ** 3


def penalty_at(t: int, peak: float, steps: int, rounds: int) -> float:
    """lambda_t = peak * floor(Q t / T) / Q (Eq. 3), so 0 at first."""
    return peak * (steps * t // rounds) / steps


def published_penalty_at(t: int, peak: float, steps: int, rounds: int, start: float = 5e-4) -> float:
    """The published code's (D1): 0, then `start`, from there in equal steps; where T < Q, its last value (D2)."""
    step = min(t // (rounds // steps), steps - 1) if rounds >= steps else steps - 1
    return start + (step - 1) * (peak - start) / (steps - 1) if step else 0.0


# 3. The client


def batches(data: Dataset, indices: Tensor, size: int, epochs: int, generator: torch.Generator) -> Iterator[Batch]:
    """Shuffled passes over the training samples `indices` (k,); a pass's last batch may be short."""
    for _ in range(epochs):
        order = torch.randperm(len(indices), generator=generator).to(indices.device)
        for batch in indices[order].split(size):
            images = augment(data.train_images[batch], data.augmentation, generator)
            yield normalise(images, data), data.train_labels[batch]


def penalty(w: Tensors, names: Iterable[str]) -> Tensor:
    """The sum of the tensors' L2 norms, not squared (D3)."""
    return torch.stack([w[name].norm() for name in names]).sum()


def local_update(
    net: nn.Module, w: Tensors, m: Tensors, data: Iterable[Batch], lr: float, weight_decay: float, strength: float,
    also_seen: Iterable[Tensor] | None = None,
) -> tuple[Tensors, Tensor]:  # fmt: skip
    """Error feedback (Eq. 1-2) under the growing penalty, for each batch b, with lambda = `strength`:

        g = grad [loss(w*m; b) + lambda * sum_l ||w_l*m_l||]  at w*m,      w <- w - lr * (g + weight_decay * w)

    The gradient is the pruned model's, the step the dense one's: pruned weights move on, and may come back. Were the
    mask a part of the graph, they would have no gradient; so w*m is a leaf.

    `also_seen` is not None in preset `repo`: BatchNorm's statistics then come from a second, dense pass of each batch
    (D12), and in the end from these images, too (D13).

    Returns: (w, mean cross-entropy over the samples). The arguments are left alone.
    """
    net.train()
    w, trained = {name: value.clone() for name, value in w.items()}, [name for name, _ in net.named_parameters()]
    losses, samples = [], 0
    for images, labels in data:
        leaf = masked(w, m)
        parameters = [leaf[name].requires_grad_() for name in trained]
        loss = F.cross_entropy(functional_call(net, leaf, images), labels)
        gradients = torch.autograd.grad(loss + strength * penalty(leaf, m), parameters)
        with torch.no_grad():
            if also_seen is None:
                w.update({name: leaf[name] for name in w.keys() - trained})  # BatchNorm's statistics
            else:
                functional_call(net, w, images)
            for name, gradient in zip(trained, gradients, strict=True):
                w[name] -= lr * (gradient + weight_decay * w[name])
        losses.append(loss.detach() * len(labels))
        samples += len(labels)
    with torch.no_grad():
        for images in also_seen or ():
            functional_call(net, w, images)
    return w, torch.stack(losses).sum() / samples


# 4. The server


def average(models: Sequence[Tensors], samples: Sequence[int]) -> Tensors:
    """sum_n rho_n w_n, rho_n = client n's share of the samples; BatchNorm's statistics likewise (D14)."""
    shares = [count / sum(samples) for count in samples]
    return {name: sum(rho * w[name] for rho, w in zip(shares, models, strict=True)) for name in models[0]}


@torch.no_grad()
def evaluate(net: nn.Module, w: Tensors, m: Tensors, data: Dataset) -> float:
    """Accuracy of the sparse model w*m on the test set, in [0, 1]."""
    sparse, right = masked(w, m), 0
    for images, labels in zip(data.test_images.split(1000), data.test_labels.split(1000), strict=True):
        right += (functional_call(net.eval(), sparse, normalise(images, data)).argmax(1) == labels).sum()
    return float(right) / len(data.test_labels)


# 5. The rounds


def draw(*address: int) -> torch.Generator:
    """Every draw has a generator of its own, by its address; integers hash alike in every process."""
    return torch.Generator().manual_seed(hash(address) % 2**63)


def draw_cohort(s: Settings, t: int) -> list[int]:
    return torch.randperm(s.clients, generator=draw(s.seed, 1, t))[: s.clients_per_round].tolist()


def draw_mask(s: Settings, w: Tensors, names: Sequence[str], client: int) -> Tensors:
    return random_mask(w, names, 1 - s.initial_sparsity, draw(s.seed, 2, client))


def draw_shuffle(s: Settings, t: int, client: int) -> torch.Generator:
    return draw(s.seed, 3, t, client)


def train(
    net: nn.Module, w: Tensors, data: Dataset, train_shards: Sequence[Tensor], test_shards: Sequence[Tensor],
    s: Settings, cohort: Callable = draw_cohort, first_mask: Callable = draw_mask, shuffle: Callable = draw_shuffle,
) -> Iterator[tuple[Tensors, Tensors, float, float]]:  # fmt: skip
    """FedDIP from the weights `w`: yields (dense w, m, lambda_t, training loss) after every round.

    `train_shards[n]` and `test_shards[n]` are the indices of client n's samples, int64 (k,). `cohort` says who takes
    part in a round, `first_mask` what a client prunes in the first, `shuffle` in which order it sees its samples.
    """
    names, repo = prunable(net), s.preset == "repo"
    m = topk_mask(w, names, 0.0)
    for t in range(s.rounds):
        schedule = published_penalty_at if repo else penalty_at
        strength = s.penalty_max and schedule(t, s.penalty_max, s.penalty_steps, s.rounds)
        sent, replies, losses, samples = masked(w, m), [], [], []
        for client in cohort(s, t):
            own = m if t else first_mask(s, w, names, client)  # round 0 sends the dense w, and each prunes its own (D7)
            shard, order = train_shards[client], shuffle(s, t, client)
            mine = batches(data, shard, s.batch_size, s.local_epochs, order)
            tests = normalise(data.test_images[test_shards[client]], data).split(s.batch_size) if repo else None
            reply, loss = local_update(net, sent, own, mine, s.lr * s.lr_decay**t, s.weight_decay, strength, tests)
            replies.append(reply)
            losses.append(len(shard) * loss)
            samples.append(len(shard))
        mean = average(replies, samples)
        if s.preset == "memory":  # what the clients changed is added to the dense w that the server kept
            mean = {name: w[name] + (mean[name] - sent[name]) for name in w}
        if t % s.mask_interval == 0:
            source = masked(mean, m) if repo else mean  # repo: what is pruned once stays pruned (D8)
            m = topk_mask(source, names, sparsity_at(t, s.initial_sparsity, s.target_sparsity, s.rounds))
        w = mean
        yield w, m, strength, float(sum(losses) / sum(samples))


# 6. All together


def lenet5() -> nn.Module:
    """LeNet-5 for 28 x 28 pixels and ten classes: 61 706 weights, 61 470 of them prunable."""
    convolutions = [nn.Conv2d(1, 6, 5, padding=2), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(6, 16, 5), nn.MaxPool2d(2)]
    head = [nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)]
    return nn.Sequential(*convolutions, nn.ReLU(), nn.Flatten(), *head)


def main(device: str = "cpu", s: Settings = Settings()) -> float:
    """FedDIP on the digits: prints a row per round, prunes a last time, and returns the sparse model's accuracy."""
    data = load_dataset("digits").to(device)
    labels = [part.cpu().numpy() for part in (data.train_labels, data.test_labels)]
    split = partition_iid(*labels, s.clients, np.random.default_rng(s.seed))
    shards = [[torch.from_numpy(shard).to(device) for shard in part] for part in (split.train, split.test)]
    torch.manual_seed(s.seed)
    net = lenet5().to(device)
    initial = {name: value.clone() for name, value in net.state_dict().items()}
    print("round  sparsity  penalty  training loss  test accuracy")
    for t, (w, m, strength, loss) in enumerate(train(net, initial, data, *shards, s)):
        sparsity = 1 - float(torch.cat([kept.flatten() for kept in m.values()]).float().mean())
        print(f"{t:5d}  {sparsity:8.3f}  {strength:7.5f}  {loss:13.4f}  {evaluate(net, w, m, data):13.4f}")
    accuracy = evaluate(net, w, topk_mask(w, prunable(net), s.target_sparsity), data)
    print(f"pruned to {s.target_sparsity}: {accuracy:.4f}")
    return accuracy


if __name__ == "__main__":
    torch.set_num_threads(1)  # batches are too small for more
    main(*sys.argv[1:])
