"""Laws of the bound: every estimator on a quadratic whose constants are known, a network's against its full Hessian and
per-sample gradients, and the assembled bound's units. Sampled estimates are held to 99 % intervals."""

import math
from dataclasses import asdict, replace

import pytest
import torch
from conftest import random_bools, random_vector, tiny_config, tiny_data, tiny_module
from scipy import stats
from torch.nn import functional as F

from feddip_lite.core.errors import Diverged
from feddip_lite.core.flat import FlatModel, Layout
from feddip_lite.core.linear import Linear
from feddip_lite.core.terms import NormTerm
from feddip_lite.studies.bound.estimators import (
    Estimates,
    Objective,
    assemble,
    dispersion,
    estimate,
    gradient_moments,
    lipschitz,
    pruning_distance,
    slope,
    smoothness,
)
from feddip_lite.train.round import pruning_error

SIZE = 12
LEVEL = 0.99
FAST = {"batches": 4, "curvature_samples": 60, "iterations": 3, "progress": False}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hessian_of(*eigenvalues: float) -> torch.Tensor:
    """(SIZE, SIZE) float64 with these eigenvalues, and 0 for the rest, in a basis that is not the coordinates'."""
    basis, _ = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator(), dtype=torch.float64))
    values = F.pad(torch.tensor(eigenvalues, dtype=torch.float64), (0, SIZE - len(eigenvalues)))
    return basis @ values.diag() @ basis.T


def quadratic(hessian, centre):
    """f(w) = (w - c)' H (w - c) / 2 and its gradient H (w - c)."""
    return lambda w: (w - centre) @ hessian @ (w - centre) / 2, lambda w: hessian @ (w - centre)


def vectors(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, SIZE, generator=generator(seed), dtype=torch.float64)


def equal(clients: int) -> torch.Tensor:
    return torch.full((clients,), 1 / clients, dtype=torch.float64)


def holds(values, expected: float) -> bool:
    """Whether `expected` is inside the 99 % interval of the mean of independent `values`."""
    values = torch.tensor(values)
    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * float(values.std()) / math.sqrt(len(values))
    return abs(float(values.mean()) - expected) <= half


@pytest.mark.parametrize("eigenvalues", [(5, 3, 1), (-5, 3, 1), (5, -5, 1)])
def test_smoothness_is_the_largest_absolute_eigenvalue(eigenvalues):
    loss, _ = quadratic(hessian_of(*eigenvalues), vectors(1)[0])
    point = list(vectors(1, seed=1)[0].split([5, 7]))
    found = smoothness(lambda *parts: loss(torch.cat(parts)), point, generator())
    assert found == pytest.approx(5, rel=1e-2)


def test_smoothness_never_falls_with_more_iterations_and_stays_below_the_eigenvalue():
    loss, _ = quadratic(hessian_of(5, -4.5, 4, 2), vectors(1)[0])
    found = [smoothness(loss, vectors(1), generator(), iterations) for iterations in (1, 2, 5, 20)]
    assert found == sorted(found) and found[-1] <= 5 * (1 + 1e-12)


def test_smoothness_of_a_flat_function_is_zero():
    assert smoothness(lambda w: (w * 0).square().sum(), [vectors(1)[0]], generator()) == 0


def test_secant_is_the_eigenvalue_along_its_direction_and_at_most_the_largest_elsewhere():
    hessian = hessian_of(-5, 3, 1)
    _, gradient = quadratic(hessian, vectors(1)[0])
    x, y, direction = *vectors(2, seed=1), torch.linalg.eigh(hessian)[1][:, 0]
    assert slope((gradient(x), gradient(x + 0.1 * direction)), (x, x + 0.1 * direction)) == pytest.approx(5)
    assert slope((gradient(x), gradient(y)), (x, y)) <= 5


def test_slope_of_the_loss_along_one_direction_has_a_closed_form_and_none_between_equal_points():
    loss, _ = quadratic(torch.eye(SIZE, dtype=torch.float64), torch.zeros(SIZE, dtype=torch.float64))
    x = vectors(1)[0]
    assert slope((loss(x), loss(3 * x)), (x, 3 * x)) == pytest.approx(2 * x.norm().item())
    assert math.isnan(slope((loss(x), loss(x)), (x, x)))


def test_lipschitz_constant_on_the_way_to_the_centre_is_the_first_gradient_norm():
    hessian, (start, centre) = hessian_of(5, 3, 1), vectors(2)
    loss, gradient = quadratic(hessian, centre)
    path = [start + share * (centre - start) for share in torch.linspace(0, 1, 20)]
    mu = lipschitz(gradient(w) for w in path)
    assert mu == pytest.approx((hessian @ (start - centre)).norm().item())
    assert all(slope((loss(x), loss(y)), (x, y)) <= mu for x, y in zip(path, path[1:], strict=False))


def test_variance_and_squared_norms_by_hand():
    variance, squares = gradient_moments(torch.tensor([[3.0, 0.0], [1.0, 0.0], [2.0, 3.0]]))
    assert variance == pytest.approx((1 + 1 + 0 + 1 + 1 + 4) / 2)
    assert squares.tolist() == [9, 1, 13]


def test_variance_is_unbiased():
    sigma, count = 0.7, 20
    found = gradient_moments(1 + sigma * vectors(count))[0] / (sigma**2 * SIZE)
    low, high = stats.chi2.interval(LEVEL, SIZE * (count - 1))
    assert low <= found * SIZE * (count - 1) <= high
    pairs = [gradient_moments(1 + sigma * vectors(2, seed))[0] for seed in range(200)]
    assert holds(pairs, sigma**2 * SIZE)


def test_variance_needs_two_gradients():
    with pytest.raises(ValueError, match="expected at least 2"):
        gradient_moments(vectors(1))


def test_dispersion_of_quadratics_has_a_closed_form():
    hessian, centres, w = hessian_of(5, 3, 1), vectors(3), vectors(1, seed=1)[0]
    shares = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    gradients = torch.stack([quadratic(hessian, centre)[1](w) for centre in centres])
    middle = hessian @ (w - shares @ centres)
    spread = shares @ ((centres - shares @ centres) @ hessian).square().sum(1)
    assert dispersion(gradients, shares) == pytest.approx(1 + float(spread / (middle @ middle)))


def test_dispersion_of_identical_clients_is_one():
    gradient = vectors(1)
    assert dispersion(gradient.expand(4, SIZE), torch.tensor([0.1, 0.2, 0.3, 0.4]).double()) == pytest.approx(1)


@pytest.mark.parametrize("heterogeneity", [0.0, 0.5])
def test_dispersion_from_samples_is_right_once_sampling_noise_is_taken_off(heterogeneity):
    clients, samples, batch = 10, 50, 5
    shares, true = equal(clients), vectors(1) + heterogeneity * vectors(clients, seed=1)
    expected, corrected, raw = dispersion(true, shares), [], []
    for seed in range(100):
        each = true[:, None] + 3 * vectors(clients * samples, seed).view(clients, samples, SIZE)  # per-sample gradients
        variances = [gradient_moments(client.view(-1, batch, SIZE).mean(1))[0] for client in each]
        noise = batch * torch.tensor(variances, dtype=torch.float64) / samples
        corrected.append(dispersion(each.mean(1), shares, noise))
        raw.append(dispersion(each.mean(1), shares))
    assert holds(corrected, expected)
    assert not holds(raw, expected)


def test_dispersion_is_infinite_where_noise_hides_the_mean_gradient():
    assert dispersion(vectors(3), equal(3), torch.full((3,), 1e3)) == math.inf


def test_pruning_error_and_distance_follow_their_definition():
    weights, mask = random_vector(200), random_bools(200)
    delta, distance = pruning_distance(weights, mask)
    assert delta == pytest.approx(((weights - weights * mask).norm() / weights.norm()).item() ** 2)
    assert delta == pytest.approx(pruning_error(weights, mask))
    assert distance == pytest.approx(math.sqrt(delta) * weights.norm().item())
    assert pruning_distance(weights, torch.ones_like(mask)) == (0, 0)


def network(own_linear: bool = True) -> FlatModel:
    """The tiny network with a linear layer of the package's: bound to a gradient, it is not twice differentiable."""
    module = tiny_module()
    if own_linear:
        linear = Linear(48, 4)
        linear.load_state_dict(module.linear.state_dict())
        module.linear = linear
    return FlatModel(module, Layout.of(module))


def objective(**regulariser) -> tuple[Objective, torch.Tensor]:
    """f of the tiny network on 20 images, BatchNorm statistics far from those of the module; and its weights."""
    model = network()
    buffers = model.buffers * 0 + torch.tensor([0.1, 0.2, 0.3, 2, 3, 4])
    return Objective(model, buffers, tiny_data(), **regulariser), model.weights.clone()


def test_objective_is_the_trained_loss_with_penalty_and_weight_decay():
    f, weights = objective(penalty=0.3, weight_decay=0.1)
    loss, gradient = f.loss_and_gradient(weights, torch.arange(20))
    model = network(own_linear=False)
    model.load(weights, None, f.buffers)
    model.module.eval()
    data = tiny_data()
    expected = model.kernels.loss_and_gradient(data.train_images / 255, data.train_labels)
    NormTerm(model.layout, 0.3)(model.gradient, weights, weights)
    model.gradient.add_(weights, alpha=0.1)
    norms = sum(slot.of(weights).norm() for slot in model.layout.prunable_slots)
    assert loss.item() == pytest.approx((expected + 0.3 * norms + 0.05 * weights.square().sum()).item(), rel=1e-6)
    torch.testing.assert_close(gradient, model.gradient)


def test_gradient_in_pieces_is_the_gradient():
    f, weights = objective(penalty=0.3, weight_decay=0.1)
    many = torch.arange(20).repeat(15)  # 300 samples, three pieces
    for whole, pieces in zip(f.loss_and_gradient(weights, many[:20]), f.loss_and_gradient(weights, many), strict=True):
        torch.testing.assert_close(whole, pieces, rtol=1e-5, atol=1e-6)


def test_smoothness_of_a_network_is_that_of_its_full_hessian():
    f, weights = objective(penalty=0.3, weight_decay=0.1)
    oracle = replace(f, model=network(own_linear=False))
    slots, before = f.model.layout.slots, [f.model.weights.clone(), f.model.gradient.clone(), f.model.buffers.clone()]
    images = torch.arange(20)
    hessian = torch.autograd.functional.hessian(
        lambda w: oracle.loss(images, *[slot.of(w) for slot in slots]), weights, vectorize=True
    )
    found = smoothness(lambda *x: f.loss(images, *x), [slot.of(weights) for slot in slots], generator(), 60)
    assert found == pytest.approx(torch.linalg.eigvalsh(hessian).abs().max().item(), rel=1e-2)
    for old, new in zip(before, [f.model.weights, f.model.gradient, f.model.buffers], strict=True):
        assert torch.equal(old, new)


def test_a_tensor_pruned_to_nothing_has_finite_estimates():
    f, weights = objective(penalty=0.3)
    slot = f.model.layout.slots[0]
    slot.of(weights).zero_()
    assert f.loss_and_gradient(weights, torch.arange(20))[1].isfinite().all()
    tensors = [slot.of(weights) for slot in f.model.layout.slots]
    assert math.isfinite(smoothness(lambda *x: f.loss(torch.arange(20), *x), tensors, generator(), 3))


def test_estimates_are_repeatable_whatever_the_number_of_workers_and_change_nothing(federation):
    found = []
    for workers in (1, 3):
        config = tiny_config(workers=workers, method_options={"erk": "shared"})  # sparse from the start
        state, clients, _ = federation(config)
        before = state.weights.clone(), state.mask.clone(), torch.get_rng_state()
        found += [estimate(state, clients, tiny_config(), weight_decay=0.01, penalty=0.01, **FAST) for _ in range(2)]
        assert all(map(torch.equal, before, (state.weights, state.mask, torch.get_rng_state())))
    assert found[0] == found[1] == found[2] == found[3]
    assert all(math.isfinite(value) for value in asdict(found[0]).values())


def test_estimates_of_a_checkpoint_are_what_they_say(federation):
    config = tiny_config(clients=2, clients_per_round=2, width=0.2, batch_size=64)
    state, clients, _ = federation(config)
    clients = replace(clients, train=tuple(shard[:150] for shard in clients.train))  # 150 samples, and 150 batches
    found = estimate(state, clients, config, **{**FAST, "batches": 150})

    def per_sample(model):
        f, layout = Objective(model, state.buffers, clients.data), model.layout
        point = layout.masked(state.weights, state.mask)
        return [torch.stack([f.loss_and_gradient(point, i[None])[1] for i in shard]) for shard in clients.train]

    each = [gradients.double() for gradients in clients.workers.submit(per_sample).result()]
    means = torch.stack([gradients.mean(0) for gradients in each])
    grams = [(own - own.mean(0)) @ (own - own.mean(0)).T / 150 / 64 for own in each]  # of a batch's gradient noise
    deviation = math.sqrt(sum(2 * float(gram.square().sum()) / (150 - 1) for gram in grams)) / 2
    square, noise = float(means.mean(0).square().sum()), 64 * found.variance / 150
    assert found.gradient_square == pytest.approx(square, rel=1e-3)
    assert found.raw_dispersion == pytest.approx(float(means.square().sum(1).mean()) / square, rel=1e-3)
    assert found.dispersion == pytest.approx((found.raw_dispersion * square - noise) / (square - noise / 2), rel=1e-3)
    assert abs(found.variance - sum(float(gram.trace()) for gram in grams) / 2) <= stats.norm.ppf(0.995) * deviation
    assert found.second_moment >= found.second_moment_99 >= found.gradient_square
    assert (found.pruning_error, found.pruning_distance) == pruning_distance(
        state.weights[: len(state.mask)], state.mask
    )


def test_clients_that_share_one_data_set_have_raw_dispersion_one(federation):
    state, clients, _ = federation(tiny_config())
    shared = replace(clients, train=(clients.train[0],) * 6)
    assert estimate(state, shared, tiny_config(), **FAST).raw_dispersion == pytest.approx(1, rel=1e-6)


def test_a_dense_checkpoint_has_no_pruning_error_and_nothing_between_two_points(federation):
    state, clients, _ = federation(tiny_config(method="fedavg"))
    found = estimate(state, clients, tiny_config(), **FAST)
    assert (found.pruning_error, found.pruning_distance) == (0, 0)
    assert math.isnan(found.secant) and math.isnan(found.pruning_lipschitz)
    assert found.sharpness > 0


def test_a_diverged_checkpoint_is_refused(federation):
    state, clients, _ = federation(tiny_config())
    with pytest.raises(Diverged, match="loss at a checkpoint is nan"):
        estimate(replace(state, weights=state.weights * math.nan), clients, tiny_config(), **FAST)


def checkpoint(loss: float = 2.0, **changes) -> Estimates:
    """Estimates by hand: L = 4, mu = 3, sum rho sigma^2 = 0.6, G^2 = 9, gamma = 1.5."""
    values = {"gradient_square": 1.0, "sharpness": 4.0, "secant": 2.0, "lipschitz": 3.0, "pruning_lipschitz": 1.0}
    values |= {"variance": 0.6, "second_moment": 9.0, "second_moment_99": 8.0, "dispersion": 1.5}
    values |= {"raw_dispersion": 1.6, "pruning_error": 0.1, "pruning_distance": 0.5}
    return Estimates(round=0, loss=loss, **{**values, **changes})


RUN = {"participants": 5, "steps": 10, "gamma": 1.5}


def test_the_bound_as_the_slide_prints_it_and_as_descent_gives_it():
    path = [checkpoint(2.0, gradient_square=3.0), checkpoint(0.5), checkpoint(0.7, sharpness=1.0, secant=math.nan)]
    smooth, gamma = 4, 1.5
    chi = ((gamma - 1) * smooth**2 + smooth) / (2 * 5) * 0.6 + (gamma - 1) * gamma * 10**2 * smooth**2 * 9 / 2
    bound = assemble(path, [0.5, 0.25], **RUN, printed=True)
    assert bound.left == pytest.approx(5 / 3)
    assert bound.initial == pytest.approx(2 * smooth * 1.5)
    assert bound.pruning == pytest.approx(2 * smooth * 3 * 0.75 / (3 * smooth**2))
    assert bound.noise + bound.drift == pytest.approx(math.pi**2 / (3 * smooth**2) * chi)
    chi = gamma * smooth / (2 * 5) * 0.6 + (gamma - 1) * gamma * 10**2 * smooth * 9 / 2
    bound = assemble(path, [0.5, 0.25], **RUN)
    assert bound.pruning == pytest.approx(2 * smooth * 3 * 0.75)
    assert bound.noise + bound.drift == pytest.approx(math.pi**2 / (3 * smooth) * chi)
    assert sum(bound.shares().values()) == pytest.approx(1)
    assert bound.shares()["pruning"] == pytest.approx(18 / (12 + 18 + bound.noise + bound.drift))


def test_the_learning_rates_smoothness_counts_where_it_is_larger_than_the_one_found():
    path, larger = [checkpoint(2.0), checkpoint(1.0)], [checkpoint(2.0, sharpness=8.0), checkpoint(1.0)]
    assert assemble(path, [0.5], **RUN, smooth=8.0) == assemble(larger, [0.5], **RUN)
    assert assemble(path, [0.5], **RUN, smooth=3.0) == assemble(path, [0.5], **RUN) != assemble(larger, [0.5], **RUN)


def in_other_units(each: Estimates, loss: float, weight: float) -> Estimates:
    """The same checkpoint with the loss in units 1/`loss` and the weights in units 1/`weight` as large."""
    powers = {"loss": (1, 0), "sharpness": (1, 2), "secant": (1, 2), "lipschitz": (1, 1), "pruning_lipschitz": (1, 1)}
    powers |= dict.fromkeys(("gradient_square", "variance", "second_moment", "second_moment_99"), (2, 2))
    powers |= {"pruning_distance": (0, -1)}
    return replace(each, **{name: getattr(each, name) * loss**a / weight**b for name, (a, b) in powers.items()})


def test_every_term_of_the_consistent_bound_scales_like_the_left_side_and_the_printed_one_does_not():
    path, distances = [checkpoint(2.0), checkpoint(1.0)], [0.5, 0.25]
    other, longer = [in_other_units(each, 3, 10) for each in path], [10 * distance for distance in distances]
    same = asdict(assemble(path, distances, **RUN))
    assert asdict(assemble(other, longer, **RUN)) == pytest.approx({name: 0.09 * x for name, x in same.items()})
    printed, rescaled = assemble(path, distances, **RUN, printed=True), assemble(other, longer, **RUN, printed=True)
    assert rescaled.pruning != pytest.approx(0.09 * printed.pruning)
    assert rescaled.noise != pytest.approx(0.09 * printed.noise)


@pytest.mark.parametrize("gamma", [1.0, 0.98])
def test_clients_that_agree_do_not_drift(gamma):
    assert assemble([checkpoint()], [0.5], **{**RUN, "gamma": gamma}).drift == 0
