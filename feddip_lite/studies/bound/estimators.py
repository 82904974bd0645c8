"""What the convergence bound's terms are worth: an estimator of each term of the slides' Eq. 4, and the bound itself.

    1/T sum_t ||grad f(w'_t)||^2  <=  2L (f(w_1) - f*)  +  2L sum_t mu sqrt(delta_t) ||w_t||  +  noise  +  drift

w is the dense average of the clients' weights, w' = w*m the pruned one; the learning rate is 1/(tL). The slide names f*
and gamma only; the other definitions are the usual ones of such analyses, unverified. Units: F of the loss, W of the
weights. A network with ReLU has no global L or mu: what is found is local, a lower bound. Before: `train/round.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from tqdm import tqdm

from ...config import Config
from ...core.errors import Diverged
from ...core.flat import FlatModel
from ...core.seeds import torch_generator
from ...core.state import ServerState
from ...data.datasets import Dataset, normalise
from ...train.evaluate import EVALUATION_BATCH
from ...train.round import Clients


def smoothness(loss: Callable[..., Tensor], point: Sequence[Tensor], draw: torch.Generator, iterations=30) -> float:
    """L [F/W^2] at one point: the largest |eigenvalue| of the Hessian H, by power iteration v <- Hv / ||Hv||.

    ||Hv|| of a unit v never exceeds L and never falls, even where L and -L both are eigenvalues; its error shrinks as
    (second largest / largest)^(2 iterations). `loss` is a twice differentiable function of the tensors of `point`.
    """
    leaves = [part.detach().requires_grad_() for part in point]
    gradient = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    v = [torch.randn(part.shape, generator=draw).to(part) for part in leaves]
    for _ in range(iterations):
        norm = _norm(*v) or 1.0  # H may be 0
        unit = [part / norm for part in v]
        v = torch.autograd.grad(gradient, leaves, unit, retain_graph=True, materialize_grads=True)
    return _norm(*v)


def slope(values: Sequence[Tensor], points: Sequence[Tensor]) -> float:
    """||value - value'|| / ||point - point'|| of two points (n,), NaN if these are equal: of gradients (n,) the secant
    lower bound of L [F/W^2], of losses () one of mu [F/W]; between w and w*m, what a unit of pruned weights costs."""
    distance = _norm(points[0].double() - points[1])
    return _norm(values[0].double() - values[1]) / distance if distance else math.nan


def lipschitz(gradients: Iterable[Tensor]) -> float:
    """mu [F/W], the Lipschitz constant of f along a path: the largest norm of the gradients (n,) found on it. (Read as
    a constant of strong convexity, mu would give the pruning term a wrong unit.)"""
    return max(_norm(gradient) for gradient in gradients)


def gradient_moments(gradients: Tensor) -> tuple[float, Tensor]:
    """sigma_n^2 = B/(B-1) * mean ||g - mean g||^2 and each ||g||^2 (B,) [F^2/W^2] of a client's mini-batch gradients g
    (B, n) at one point; unbiased for independent batches. G^2 is the largest ||g||^2. Raises ValueError if B < 2."""
    if len(gradients) < 2:
        raise ValueError(f"gradients: {len(gradients)} of them; expected at least 2")
    return float(gradients.double().var(0).sum()), gradients.double().square().sum(1)


def dispersion(gradients: Tensor, shares: Tensor, noise: Tensor | float = 0.0) -> float:
    """gamma = sum rho_n ||grad f_n||^2 / ||sum rho_n grad f_n||^2, without unit: 1 if the clients agree, else above.

    Sampling noise alone keeps gamma above 1 for clients that draw from one distribution, so what is expected of it is
    taken off: noise_n above, rho_n^2 noise_n below. Then an estimate may fall short of 1, and is infinite where noise
    hides the mean gradient. Samples must be independent: for copies of one data set the noise to take off is 0.
    `gradients` are (N, n), over D_n samples each; `shares` rho_n (N,) float64, of sum 1; `noise` (N,) is
    b sigma_n^2 / D_n [F^2/W^2] for the sigma_n^2 of batches of b.
    """
    squares, mean = gradients.double().square().sum(1), shares @ gradients.double()
    below = float(mean @ mean - (shares**2 * noise).sum())
    return float(shares @ (squares - noise)) / below if below > 0 else math.inf


def pruning_distance(prunable: Tensor, mask: Tensor) -> tuple[float, float]:
    """delta = ||w - w*m||^2 / ||w||^2 and sqrt(delta) ||w|| = ||w - w*m|| [W], exact, of the dense average's prunable
    part (P,) (docs/deviations.md D26). 0 where nothing is pruned."""
    distance, norm = _norm(prunable[~mask]), _norm(prunable)
    return (distance / norm) ** 2 if norm else 0.0, distance


@dataclass(frozen=True)
class Objective:
    """f [F]: mean cross-entropy + penalty * sum_l ||w_l||_2 (prunable tensors) + weight_decay / 2 * ||w||^2, in
    evaluation mode, on images without augmentation. Of `model` only the mode is changed."""

    model: FlatModel
    buffers: Tensor
    data: Dataset
    penalty: float = 0.0
    weight_decay: float = 0.0

    def loss(self, indices: Tensor, *tensors: Tensor) -> Tensor:
        """f () over training samples `indices` (k,), of the weights by tensor, in the layout's order."""
        values = {slot.name: tensor for slot, tensor in zip(self.model.layout.slots, tensors, strict=True)}
        values |= {slot.name: slot.of(self.buffers) for slot in self.model.layout.buffer_slots}
        images = normalise(self.data.train_images[indices], self.data)
        logits = functional_call(self.model.module.eval(), values, images)
        loss = F.cross_entropy(logits, self.data.train_labels[indices])
        if self.penalty:  # not of a tensor pruned to nothing: its norm has a kink there
            prunable = [tensor for tensor in tensors[: self.model.layout.num_prunable] if tensor.any()]
            loss = loss + self.penalty * sum(torch.linalg.vector_norm(tensor) for tensor in prunable)
        return loss + self.weight_decay / 2 * sum(tensor.square().sum() for tensor in tensors)

    def loss_and_gradient(self, weights: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """f () and its gradient (n,) [F/W] at `weights` (n,), in pieces that fit a core's cache."""
        total, gradient = weights.new_zeros((), dtype=torch.float64), torch.zeros_like(weights)
        for piece in indices.split(EVALUATION_BATCH):
            # Leaves each: views of one leaf would be asked in vain for gradients by `operators.Linear`.
            leaves = [slot.of(weights.detach()).requires_grad_() for slot in self.model.layout.slots]
            loss, share = self.loss(piece, *leaves), len(piece) / len(indices)
            parts = torch.autograd.grad(loss, leaves)
            total += share * loss.detach()
            gradient.add_(torch.cat([part.flatten() for part in parts]), alpha=share)
        if not total.isfinite():
            raise Diverged(f"the training loss at a checkpoint is {float(total)}")
        return total, gradient


@dataclass(frozen=True)
class Estimates:
    """A checkpoint's estimates; those between w and w' are NaN where nothing is pruned."""

    round: int  # the next one
    loss: float  # f(w') [F]
    gradient_square: float  # ||grad f(w')||^2 [F^2/W^2]
    sharpness: float  # L at w' (a configuration's `smoothness` stands beside it in recorded runs)
    secant: float  # L between w and w'
    lipschitz: float  # mu at w and w'
    pruning_lipschitz: float  # mu between them
    variance: float  # sum rho_n sigma_n^2
    second_moment: float  # G^2
    second_moment_99: float  # 99 % quantile of ||g||^2
    dispersion: float  # gamma
    raw_dispersion: float  # gamma with its sampling noise
    pruning_error: float  # delta
    pruning_distance: float  # sqrt(delta) ||w||


def estimate(
    state: ServerState, clients: Clients, config: Config, *, penalty=0.0, weight_decay=0.0, batches=20,
    curvature_samples=1024, iterations=30, progress=True,
) -> Estimates:  # fmt: skip
    """All estimates at one checkpoint, on the clients' workers, of f with this `penalty` and `weight_decay`.

    Client gradients are over all their samples; one is held for each. L and mu come from `curvature_samples` of the
    training samples, the same at every checkpoint; sigma_n^2 and G^2 from `batches` batches per client at w', drawn
    with replacement: shuffled ones vary less, by the factor 1 - b/D_n.

    Raises:
        Diverged: a loss is NaN or infinite. ValueError: fewer than two `batches`.
    """
    prunable, mask, t = state.weights[: len(state.mask)], state.mask, state.round
    pruned = torch.cat([prunable * mask, state.weights[len(mask) :]])
    f = partial(Objective, buffers=state.buffers, data=clients.data, penalty=penalty, weight_decay=weight_decay)

    def curvature(model: FlatModel) -> tuple[float, ...]:
        samples, points = torch.cat(clients.train), (state.weights, pruned)
        order = torch.randperm(len(samples), generator=torch_generator(config.seed, "bound subset"))
        some = samples[order[:curvature_samples].to(samples.device)]
        losses, gradients = zip(*(f(model).loss_and_gradient(point, some) for point in points), strict=True)
        tensors = [slot.of(pruned) for slot in model.layout.slots]
        draw = torch_generator(config.seed, "bound direction", t)
        largest = smoothness(partial(f(model).loss, some), tensors, draw, iterations)
        return largest, slope(gradients, points), lipschitz(gradients), slope(losses, points)

    def moments(model: FlatModel, client: int) -> tuple[Tensor, Tensor, float, Tensor]:
        shard, draw = clients.train[client], torch_generator(config.seed, "bound batches", t, client)
        drawn = torch.randint(len(shard), (batches, min(config.batch_size, len(shard))), generator=draw)
        steps = [f(model).loss_and_gradient(pruned, batch)[1] for batch in shard[drawn.to(shard.device)]]
        return *f(model).loss_and_gradient(pruned, shard), *gradient_moments(torch.stack(steps))

    submit = clients.workers.submit
    jobs = [submit(curvature), *(submit(moments, client) for client in range(len(clients.train)))]
    bar = tqdm(jobs, f"bound at round {t}", unit="job", disable=not progress, ascii=True)
    constants, *rows = [job.result() for job in bar]
    losses, gradients, variances, squares = zip(*rows, strict=True)
    gradients, squares = torch.stack(gradients).double().cpu(), torch.cat(squares).cpu()
    sizes = torch.tensor([len(shard) for shard in clients.train], dtype=torch.float64)
    variances = torch.tensor(variances, dtype=torch.float64)
    shares = sizes / sizes.sum()
    noise = sizes.clamp_max(config.batch_size) * variances / sizes
    sharpness, secant, steepest, per_pruned = constants
    error, distance = pruning_distance(prunable, mask)
    return Estimates(
        round=t,
        loss=float(shares @ torch.stack(losses).cpu()),
        gradient_square=_norm(shares @ gradients) ** 2,
        sharpness=sharpness,
        secant=secant,
        lipschitz=steepest,
        pruning_lipschitz=per_pruned,
        variance=float(shares @ variances),
        second_moment=float(squares.max()),
        second_moment_99=float(squares.quantile(0.99)),
        dispersion=dispersion(gradients, shares, noise),
        raw_dispersion=dispersion(gradients, shares),
        pruning_error=error,
        pruning_distance=distance,
    )


def _norm(*tensors: Tensor) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


@dataclass(frozen=True)
class Bound:
    """The left side of Eq. 4 and the terms of its right side, [F^2/W^2] where consistent."""

    left: float
    initial: float
    pruning: float
    noise: float
    drift: float

    def shares(self) -> dict[str, float]:
        """Each term's share of the right side."""
        right = self.initial + self.pruning + self.noise + self.drift
        return {name: term / right for name, term in asdict(self).items() if name != "left"}


def assemble(
    path: Sequence[Estimates], distances: Iterable[float], *, participants: int, steps: int, gamma: float,
    smooth: float = 0.0, printed: bool = False,
) -> Bound:  # fmt: skip
    """A run's bound from its checkpoints, evenly spread: the mean of the left side, the largest of each constant.

        initial  2L (f(w_1) - f*)                           f*: the least loss on the path
        pruning  2L mu sum_t sqrt(delta_t) ||w_t||          printed: divided by 3L^2
        noise    pi^2/3 gamma sum rho_n sigma_n^2 / (2K)    printed: gamma - 1 + 1/L for gamma
        drift    pi^2/3 (gamma - 1) gamma E_l^2 G^2 / 2

    What is not printed follows from one-step descent. No form decays with T, and `initial` alone bounds any smooth f
    that has not risen: that the bound holds says nothing, its shares do.

    Args:
        distances: sqrt(delta_t) ||w_t|| [W] of every round. participants: K. steps: E_l, local steps, not epochs.
        gamma: finite; counts as 1 if below. smooth: the learning rate's L, if larger.
    """

    def largest(*names: str) -> float:
        found = [getattr(each, name) for each in path for name in names]
        return max(filter(math.isfinite, found), default=math.inf)

    losses = [each.loss for each in path]
    gamma, smooth = max(gamma, 1.0), max(smooth, largest("sharpness", "secant"))
    pruning = 2 * smooth * largest("lipschitz", "pruning_lipschitz") * sum(distances)
    noise = math.pi**2 / 6 * largest("variance") / participants
    drift = math.pi**2 / 6 * (gamma - 1) * gamma * steps**2 * largest("second_moment")
    left = sum(each.gradient_square for each in path) / len(path)
    initial = 2 * smooth * (losses[0] - min(losses))
    if printed:
        pruning, noise = pruning / (3 * smooth**2), noise * (gamma - 1 + 1 / smooth)
    else:
        noise = noise * gamma
    return Bound(left=left, initial=initial, pruning=pruning, noise=noise, drift=drift)
