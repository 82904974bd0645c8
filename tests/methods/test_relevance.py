"""Laws of relevance: what reaches each layer, the epsilon rule by hand, zero activations, BatchNorm, the stand-in."""

from collections import OrderedDict

import pytest
import torch
from conftest import random_vector, tiny_module
from torch import nn
from torch.nn import functional as F

from feddip_lite.core.flat import FlatModel, Layout
from feddip_lite.core.models import build_model
from feddip_lite.methods.relevance import epsilon_rule, gradient_activation, layerwise_relevance

SHAPES = {"lenet5": (1, 28), "alexnet": (3, 32), "resnet18": (3, 32)}


def flat(module):
    return FlatModel(module.eval(), Layout.of(module))


def by_tensor(model, vector):
    return {slot.name: slot.of(vector) for slot in model.layout.slots}


def without_biases():
    layers = {"conv": nn.Conv2d(1, 4, 3, bias=False), "relu": nn.ReLU(), "pool": nn.MaxPool2d(2)}
    layers |= {"flatten": nn.Flatten(), "fc1": nn.Linear(16, 8, bias=False), "relu2": nn.ReLU()}
    return nn.Sequential(OrderedDict(**layers, fc2=nn.Linear(8, 4, bias=False)))


def batch(shape=(1, 6, 6), count=5, classes=4):
    return random_vector(count * torch.Size(shape).numel()).view(count, *shape), torch.arange(count) % classes


def scores_of(model, images, labels):
    return model.module(images).gather(1, labels[:, None]).sum().item()


def by_rule(inputs, weight, bias, relevance, epsilon):
    """R_ij (outputs, inputs) of one linear layer and one sample, straight from the formula."""
    z = weight @ inputs + bias
    stabiliser = epsilon * z.square().mean().sqrt()
    sign = torch.where(z >= 0, 1.0, -1.0)
    return weight * inputs * (relevance / (z + stabiliser * sign))[:, None]


def test_each_layer_without_biases_receives_the_whole_score():
    model = flat(without_biases())
    images, labels = batch()
    parts = by_tensor(model, layerwise_relevance(model, images, labels, 0.0))
    score = scores_of(model, images, labels)
    assert {name: part.sum().item() for name, part in parts.items()} == pytest.approx(
        dict.fromkeys(parts, score), rel=1e-4
    )


@pytest.mark.parametrize("name", SHAPES)
def test_the_first_layer_and_all_biases_together_receive_the_whole_score_in_every_model(name):
    channels, size = SHAPES[name]
    model = flat(build_model(name, classes=4, width=0.1, channels=channels, size=size, seed=1))
    images, labels = batch((channels, size, size))
    parts = by_tensor(model, layerwise_relevance(model, images, labels, 0.0))
    received = parts["conv1.weight"].sum() + sum(part.sum() for key, part in parts.items() if key.endswith("bias"))
    assert received.item() == pytest.approx(scores_of(model, images, labels), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("epsilon", [0.0, 0.25, 3.0])
def test_relevance_of_the_input_is_that_of_the_first_layers_weights(epsilon):
    model = flat(without_biases())
    images, labels = batch()
    parts = by_tensor(model, layerwise_relevance(model, images, labels, epsilon))
    images.requires_grad_()
    with epsilon_rule(model.module, epsilon):
        model.module(images).gather(1, labels[:, None]).sum().backward()
    received = parts["conv.weight"].sum().item()
    assert (images * images.grad).sum().item() == pytest.approx(received, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("epsilon", [0.01, 0.25, 2.0])
def test_epsilon_rule_equals_the_formula_layer_by_layer(epsilon):
    torch.manual_seed(3)
    first, second = nn.Linear(6, 5), nn.Linear(5, 3)
    model = flat(nn.Sequential(OrderedDict(first=first, relu=nn.ReLU(), second=second)))
    x, label = random_vector(6, 4), 2
    hidden = F.relu(first(x)).detach()
    scores = second(hidden).detach()
    start = torch.zeros(3).index_fill(0, torch.tensor([label]), scores[label].item())
    upper = by_rule(hidden, second.weight.detach(), second.bias.detach(), start, epsilon)
    lower = by_rule(x, first.weight.detach(), first.bias.detach(), upper.sum(0), epsilon)
    parts = by_tensor(model, layerwise_relevance(model, x[None], torch.tensor([label]), epsilon))
    torch.testing.assert_close(parts["second.weight"], upper)
    torch.testing.assert_close(parts["first.weight"], lower)


def test_a_larger_epsilon_keeps_less_of_the_score():
    model = flat(without_biases())
    images, labels = batch()
    kept = [layerwise_relevance(model, images, labels, e).abs().sum().item() for e in (0.0, 0.1, 1.0, 10.0)]
    assert kept == sorted(kept, reverse=True)
    assert 0 < kept[-1] < 0.1 * kept[0]


@pytest.mark.parametrize("rule", [lambda *given: layerwise_relevance(*given, 0.25), gradient_activation])
def test_weights_that_multiply_zero_activations_or_are_zero_have_no_relevance(rule):
    model = flat(without_biases())
    images, labels = batch()
    with torch.no_grad():
        weights = by_tensor(model, model.weights)
        weights["fc1.weight"][3] = -weights["fc1.weight"][3].abs()  # its inputs are >= 0, so unit 3 is dead
        weights["fc2.weight"][0, 5] = 0
    parts = by_tensor(model, rule(model, images, labels))
    assert torch.count_nonzero(parts["fc2.weight"][:, 3]) == 0
    assert torch.count_nonzero(parts["fc1.weight"][3]) == 0
    assert parts["fc2.weight"][0, 5] == 0
    assert torch.count_nonzero(parts["fc2.weight"][:, 4]) > 0
    assert torch.count_nonzero(rule(model, torch.zeros_like(images), labels)) == 0


def test_batchnorm_as_a_layer_gives_the_relevance_of_the_folded_convolution():
    module = tiny_module().eval()
    norm = module.norm
    with torch.no_grad():
        for k, tensor in enumerate((norm.weight, norm.bias, norm.running_mean)):
            tensor.copy_(random_vector(3, k))
        norm.running_var.copy_(random_vector(3, 9).abs() + 0.1)
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
    conv = nn.Conv2d(1, 3, 3)
    with torch.no_grad():
        conv.weight.copy_(module.conv.weight * scale[:, None, None, None])
        conv.bias.copy_(norm.bias - norm.running_mean * scale)
    folded = flat(nn.Sequential(OrderedDict(conv=conv, relu=nn.ReLU(), flatten=nn.Flatten(), linear=module.linear)))
    images, labels = batch()
    expected = by_tensor(folded, layerwise_relevance(folded, images, labels, 0.0))
    model = flat(tiny_module_of(module))
    parts = by_tensor(model, layerwise_relevance(model, images, labels, 0.0))
    for name in ("conv.weight", "linear.weight", "linear.bias"):
        torch.testing.assert_close(parts[name], expected[name])


def tiny_module_of(module):
    """A copy with weights of its own, since flat models take their module over."""
    copy = tiny_module(1)
    copy.load_state_dict(module.state_dict())
    return copy


def test_relevance_adds_up_over_images_and_leaves_weights_statistics_and_hooks_alone():
    model = flat(tiny_module())
    images, labels = batch(count=6)
    before = model.weights.clone(), model.buffers.clone()
    both = layerwise_relevance(model, images, labels, 0.0)
    halves = [layerwise_relevance(model, images[part], labels[part], 0.0) for part in (slice(3), slice(3, 6))]
    torch.testing.assert_close(both, halves[0] + halves[1])
    assert torch.equal(model.weights, before[0])
    assert torch.equal(model.buffers, before[1])
    assert not any(layer._forward_hooks for layer in model.module.modules())


def test_gradient_activation_is_weight_times_gradient_of_the_mean_loss_by_hand():
    linear = nn.Linear(4, 3, bias=False)
    model = flat(nn.Sequential(OrderedDict(linear=linear)))
    x, labels = random_vector(8).view(2, 4), torch.tensor([0, 2])
    probabilities = (x @ linear.weight.detach().T).softmax(1)
    error = probabilities - F.one_hot(labels, 3)
    expected = linear.weight.detach() * (error.T @ x / 2)
    torch.testing.assert_close(gradient_activation(model, x, labels).view(3, 4), expected)


def test_a_model_of_zeros_has_no_relevance_and_no_nan():
    model = flat(without_biases())
    model.load(torch.zeros(model.layout.size), None)
    images, labels = batch()
    for epsilon in (0.0, 0.25):
        assert torch.count_nonzero(layerwise_relevance(model, images, labels, epsilon)) == 0
