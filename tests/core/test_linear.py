"""Laws of the package's linear layer: the function and the gradients of PyTorch's own, stored or added."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from feddip_lite.core.autograd import Autograd
from feddip_lite.core.flat import FlatModel, Layout
from feddip_lite.core.linear import WORTH_IT, Linear, stores_gradients
from feddip_lite.core.models import build_model


def stock_twin(module: nn.Module) -> nn.Module:
    for layer in module.modules():
        if isinstance(layer, Linear):
            layer.__class__ = nn.Linear
    return module


@pytest.mark.parametrize(("name", "channels"), [("alexnet", 3), ("lenet5", 1), ("resnet18", 3)])
def test_stored_gradients_are_those_of_stock_layers(name, channels):
    shape = {"classes": 10, "width": 0.1, "channels": channels, "size": 32, "seed": 1}
    module, stock = build_model(name, **shape).eval(), stock_twin(build_model(name, **shape)).eval()
    model = FlatModel(module, Layout.of(module))
    images, labels = torch.rand(6, channels, 32, 32), torch.randint(10, (6,))
    model.gradient.fill_(7.0)
    loss = model.kernels.loss_and_gradient(images, labels)
    expected = nn.functional.cross_entropy(stock(images), labels)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for slot in model.layout.slots:
        torch.testing.assert_close(slot.of(model.gradient), stock.get_parameter(slot.name).grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_second_call_overwrites_the_first(precision):
    module = build_model("alexnet", classes=10, width=0.1, channels=3, size=32).eval()
    model = FlatModel(module, Layout.of(module))
    kernels = Autograd(module, model.gradient, precision)
    images, labels = torch.rand(6, 3, 32, 32), torch.randint(10, (6,))
    kernels.loss_and_gradient(images, labels)
    once = model.gradient.clone()
    kernels.loss_and_gradient(1 - images, labels)
    kernels.loss_and_gradient(images, labels)
    assert torch.equal(model.gradient, once)


def test_without_a_gradient_to_write_to_it_is_differentiable_twice():
    layer = Linear(5, 3)
    assert not stores_gradients(layer)
    x = torch.randn(2, 5)
    weights = {"weight": torch.randn(3, 5, requires_grad=True), "bias": torch.randn(3, requires_grad=True)}
    first = torch.autograd.grad(functional_call(layer, weights, x).pow(3).sum(), weights["weight"], create_graph=True)
    second = torch.autograd.grad(first[0].sum(), weights["weight"])
    assert second[0].abs().sum() > 0


@pytest.mark.parametrize("outputs", [3, WORTH_IT // 5 + 1])
def test_without_gradients_it_is_the_same_function(outputs):
    layer = Linear(5, outputs)
    x = torch.randn(2, 5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
