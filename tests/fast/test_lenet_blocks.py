"""Laws of the written-out LeNet-5: it is the same function as the module, and has the same gradient."""

import pytest
import torch
from conftest import random_bools

from feddip_lite.core.autograd import Autograd
from feddip_lite.core.flat import FlatModel, Layout
from feddip_lite.core.linear import WORTH_IT, linear, linear_gradients_
from feddip_lite.core.models import build_model
from feddip_lite.fast.choose import fastest_kernels
from feddip_lite.fast.lenet_blocks import BlockLeNet5


def lenet(width=1.0, channels=1, size=28, density=1.0, classes=10):
    module = build_model("lenet5", classes=classes, width=width, channels=channels, size=size, seed=1)
    model = FlatModel(module, Layout.of(module))
    model.weights[: model.layout.prunable] *= random_bools(model.layout.prunable, density)
    return model


def batch(count=9, channels=1, size=28, classes=10):
    """Images with a flat background, where pools have ties."""
    images = torch.rand(count, channels, size, size) * (torch.rand(count, channels, size, size) < 0.3)
    return images, torch.randint(classes, (count,))


def both(model, images, labels):
    """((loss, gradient) by autograd, the same in block form); the gradient's memory holds rubbish before."""
    results = []
    for kernels in (Autograd(model.module, model.gradient), BlockLeNet5(model)):
        model.gradient.fill_(float("nan"))
        loss = kernels.loss_and_gradient(images, labels)
        results.append((loss.clone(), model.gradient.clone()))
    return results


SHAPES = [(1.0, 1, 28, 10), (0.5, 3, 32, 7), (0.1, 1, 16, 2), (1.7, 2, 28, 100)]


@pytest.mark.parametrize("density", [1.0, 0.1, 0.01])
@pytest.mark.parametrize(("width", "channels", "size", "classes"), SHAPES)
def test_loss_and_gradient_are_those_of_autograd(width, channels, size, classes, density):
    model = lenet(width, channels, size, density, classes)
    (loss, gradient), (block_loss, block_gradient) = both(model, *batch(9, channels, size, classes))
    torch.testing.assert_close(block_loss, loss)
    torch.testing.assert_close(block_gradient, gradient, atol=1e-6, rtol=1e-5)


def test_ties_go_to_the_first_maximum_in_reading_order():
    model = lenet()
    images, labels = batch(5)
    images[:] = 0.5  # away from the border every pool is one great tie
    (_, gradient), (_, block) = both(model, images, labels)
    torch.testing.assert_close(block, gradient, atol=1e-6, rtol=1e-5)


def test_dead_network_has_a_gradient_of_its_last_bias_alone():
    model = lenet(density=0.0)
    (_, gradient), (_, block) = both(model, *batch())
    torch.testing.assert_close(block, gradient)
    assert block.isfinite().all()


@pytest.mark.parametrize("count", [1, 48, 128])
def test_a_batch_is_the_mean_of_its_samples_whatever_came_before(count):
    model = lenet(0.5)
    kernels = BlockLeNet5(model)
    images, labels = batch(count)
    kernels.loss_and_gradient(*batch(17))
    loss = kernels.loss_and_gradient(images, labels)
    whole, total = model.gradient.clone(), torch.zeros_like(model.gradient)
    losses = []
    for k in range(count):
        losses.append(kernels.loss_and_gradient(images[k : k + 1], labels[k : k + 1]))
        total += model.gradient
    torch.testing.assert_close(whole, total / count, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(loss, torch.stack(losses).mean())


def test_weights_are_read_anew_at_every_call():
    model = lenet(0.5)
    kernels = BlockLeNet5(model)
    images, labels = batch()
    kernels.loss_and_gradient(images, labels)
    model.load(0.1 * torch.randn(model.layout.size), None)
    torch.testing.assert_close(kernels.logits(images), model.module(images).detach(), atol=1e-4, rtol=1e-5)


def test_only_a_lenet_in_float32_whose_images_divide_into_blocks_is_taken_over():
    model = lenet()
    assert isinstance(fastest_kernels(model, 28, "float32"), BlockLeNet5)
    assert isinstance(fastest_kernels(model, 28, "bf16"), Autograd)
    assert isinstance(fastest_kernels(lenet(size=30), 30, "float32"), Autograd)
    module = build_model("alexnet", classes=10, width=0.05, channels=3, size=32)
    assert isinstance(fastest_kernels(FlatModel(module, Layout.of(module)), 32, "float32"), Autograd)


@pytest.mark.parametrize("outputs", [1, WORTH_IT // 64])  # either side of the size from which oneDNN is taken
def test_linear_and_its_gradients_are_those_of_autograd(outputs):
    x, weight, bias = torch.randn(5, 64), torch.randn(outputs, 64), torch.randn(outputs)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    y = torch.nn.functional.linear(x, weight, bias)
    g = torch.randn_like(y)
    y.backward(g)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight, bias), y)
        torch.testing.assert_close(linear(x, weight, bias, "relu"), y.relu())
        ours = torch.empty_like(weight), torch.empty_like(bias)
        torch.testing.assert_close(linear_gradients_(g, x, weight, *ours), x.grad)
        torch.testing.assert_close(ours, (weight.grad, bias.grad))
