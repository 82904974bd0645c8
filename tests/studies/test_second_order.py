"""Laws of the second-order study: the diagonal is the Hessian's, and agreement is what ranks and masks say."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from feddip_lite.core.models import build_model
from feddip_lite.studies.second_order import agreement, hessian_diagonal


def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 5), nn.ReLU()
        return nn.Sequential(*layers, nn.Linear(5, 3)).double()


@pytest.mark.parametrize("labels", [[0, 1, 2, 0], [2, 2, 2, 2]])
def test_diagonal_is_that_of_the_hessian_by_autograd_whatever_the_labels(labels):
    module = net()
    images = torch.randn(4, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    found = hessian_diagonal(module, weights, images)
    for name, tensor in weights.items():

        def loss(own, name=name):
            logits = functional_call(module, {**weights, name: own}, (images,))
            return F.cross_entropy(logits, torch.tensor(labels))

        full = torch.autograd.functional.hessian(loss, tensor).reshape(tensor.numel(), -1)
        torch.testing.assert_close(found[name].flatten(), full.diagonal())


def test_diagonal_of_a_linear_softmax_is_its_textbook_form():
    images = torch.randn(7, 1, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    p, x = module(images).softmax(1), images.flatten(1)
    expected = ((p * (1 - p)).T @ x.square()) / len(x)  # mean of p_c (1 - p_c) x_j^2
    torch.testing.assert_close(hessian_diagonal(module, weights, images)["1.weight"], expected.detach())


def test_probes_of_hutchinson_agree_on_average_at_lenet5():
    module = build_model("lenet5", classes=10, width=0.3, channels=1, size=28).double().eval()
    images = torch.randn(6, 1, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    leaves = [tensor.clone().requires_grad_() for tensor in weights.values()]
    logits = functional_call(module, dict(zip(weights, leaves, strict=True)), (images,))
    gradient = torch.autograd.grad(F.cross_entropy(logits, torch.arange(6)), leaves, create_graph=True)
    draw, estimates = torch.Generator().manual_seed(2), []
    for _ in range(200):
        signs = [torch.randint(0, 2, leaf.shape, generator=draw).double() * 2 - 1 for leaf in leaves]
        products = torch.autograd.grad(gradient, leaves, signs, retain_graph=True)
        estimates.append(sum(float((z * hz).sum()) for z, hz in zip(signs, products, strict=True)))
    estimates = torch.tensor(estimates)
    trace = sum(float(each.sum()) for each in hessian_diagonal(module, weights, images).values())
    assert abs(estimates.mean() - trace) < 4 * estimates.std() / 200**0.5
    assert trace > estimates.std() / 200**0.5  # that it is not 0 could be seen


def test_agreement_is_whole_for_one_curvature_and_none_for_one_that_reverses_the_order():
    weights = torch.tensor([0.0, 1.0, -2.0, 3.0, 0.0, -4.0])
    same, reverse = torch.ones(2, 6), (weights.abs().clamp_min(0.1) ** -4).expand(2, 6)
    assert agreement(weights, same) == {"rank_correlation": 1.0, "overlap": 1.0, "reliability": 1.0}
    found = agreement(weights, reverse)
    assert (found["rank_correlation"], found["overlap"]) == (-1.0, 0.0)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = agreement(weights[order], reverse[:, order])
    assert shuffled == pytest.approx(found)
