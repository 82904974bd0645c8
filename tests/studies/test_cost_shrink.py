"""Laws of shrinking: the same outputs from fewer weights, whatever is dead; CSR layers compute what dense ones do."""

import copy

import pytest
import torch
from conftest import random_bools, tiny_module
from torch import nn

from feddip_lite.core.flat import FlatModel, Layout
from feddip_lite.core.models import build_model
from feddip_lite.studies.cost.shrink import CSRLinear, plain, to_csr, without_dead_channels

SHAPES = {"lenet5": (1, 28), "alexnet": (3, 32)}
EVERY_CHAIN = pytest.mark.parametrize("name", SHAPES)


def small(name: str, width: float = 0.15) -> nn.Module:
    channels, size = SHAPES[name]
    return build_model(name, classes=10, width=width, channels=channels, size=size).eval()


def pruned(name: str, density: float, seed: int) -> nn.Module:
    """A model with a random mask, under which tensors as small as these have channels without weights."""
    module = small(name)
    model = FlatModel(module, Layout.of(module))
    model.load(model.weights.clone(), random_bools(model.layout.prunable, density, seed))
    return module


def images_of(name: str) -> torch.Tensor:
    channels, size = SHAPES[name]
    return torch.rand(5, channels, size, size)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def same_outputs(a: nn.Module, b: nn.Module, images: torch.Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(a(images), b(images), atol=1e-6, rtol=1e-5)


@EVERY_CHAIN
def test_a_plain_chain_is_the_same_function_with_weights_of_its_own(name):
    module = pruned(name, 0.5, 0)
    chain = plain(module)
    same_outputs(chain, module, images_of(name))
    assert {key: value.shape for key, value in chain.state_dict().items()} == {
        key: value.shape for key, value in module.state_dict().items()
    }
    assert all(type(layer).__module__.startswith("torch.nn") for layer in chain.modules())
    assert all(p.untyped_storage().nbytes() == 4 * p.numel() for p in chain.parameters())


def test_making_chains_draws_nothing():
    module, before = small("lenet5"), torch.get_rng_state()
    without_dead_channels(module)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("density", [0.3, 0.08, 0.02])
@EVERY_CHAIN
def test_random_masks_shrink_to_the_same_function(name, density, seed):
    module = pruned(name, density, seed)
    before = copy.deepcopy(module.state_dict())
    smaller = without_dead_channels(module)
    same_outputs(smaller, module, images_of(name))
    dead = any(not part.flatten(1).any(1).all() for key, part in before.items() if key.endswith("weight"))
    assert count(smaller) <= count(module)
    assert count(smaller) < count(module) or not dead or density > 0.1
    assert all(torch.equal(part, before[key]) for key, part in module.state_dict().items())
    assert count(without_dead_channels(smaller)) == count(smaller)


@EVERY_CHAIN
def test_a_dense_model_stays_as_it_is(name):
    module = small(name)
    weights = without_dead_channels(module).state_dict()
    assert all(torch.equal(weights[key], part) for key, part in module.state_dict().items())


def test_a_dead_channel_takes_its_row_its_bias_and_the_columns_that_read_it():
    module = small("lenet5", 1.0)
    with torch.no_grad():
        module.conv2.weight[3] = 0  # 6 * 25 weights; fc1 reads it at 25 places
        module.fc1.weight[:, 50:75] = 0  # nobody reads channel 2
        module.fc2.weight[7] = 0
    smaller = without_dead_channels(module)
    assert smaller.conv2.weight.shape == (14, 6, 5, 5)
    assert smaller.fc1.weight.shape == (120, 350)
    assert smaller.fc2.weight.shape == (83, 120)
    assert count(module) - count(smaller) == 2 * (6 * 25 + 1) + 2 * 25 * 120 + (120 + 1 + 10)
    same_outputs(smaller, module, images_of("lenet5"))


@pytest.mark.parametrize(("bias", "left"), [(0.5, 4), (-0.5, 3)])
def test_before_padding_only_a_channel_that_is_zero_after_relu_can_go(bias, left):
    chain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1), nn.Flatten(), nn.Linear(32, 2))
    with torch.no_grad():
        chain[0].weight[1] = 0
        chain[0].bias[1] = bias
    smaller = without_dead_channels(chain)
    assert len(smaller[0].weight) == left
    same_outputs(smaller, chain, torch.rand(3, 1, 6, 6))


def test_without_relu_the_constant_is_the_bias_itself():
    chain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 2, 2), nn.Flatten(), nn.Linear(2, 2))
    with torch.no_grad():
        chain[0].weight[1], chain[0].bias[1] = 0, -0.7
    smaller = without_dead_channels(chain)
    assert len(smaller[0].weight) == 3
    same_outputs(smaller, chain, torch.rand(3, 1, 6, 6))


def test_what_dies_takes_along_what_fed_it_and_what_it_fed():
    chain = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        chain[0].weight[0] = 0  # constant, and all that feeds unit 0 of the next layer
        chain[2].weight[0] = torch.tensor([1.0, 0, 0, 0])
        chain[4].weight[:, 2] = 0  # nobody reads unit 2, and only that reads unit 3 of the first layer
        chain[2].weight[1, 3] = 0
    smaller = without_dead_channels(chain)
    assert [tuple(smaller[i].weight.shape) for i in (0, 2, 4)] == [(2, 5), (1, 2), (2, 1)]
    same_outputs(smaller, chain, torch.randn(6, 5))


@EVERY_CHAIN
def test_a_model_pruned_to_nothing_keeps_a_channel_per_layer(name):
    module = pruned(name, 0.0, 0)
    smaller = without_dead_channels(module)
    assert all(0 not in part.shape for part in smaller.state_dict().values())
    same_outputs(smaller, module, images_of(name))


def test_modules_that_are_no_such_chains_are_refused_by_name():
    with pytest.raises(ValueError, match="ResNet18 is no chain"):
        without_dead_channels(build_model("resnet18", classes=3, width=0.05, channels=3, size=32))
    with pytest.raises(ValueError, match="'conv' needs a bias"):
        without_dead_channels(tiny_module())
    with pytest.raises(ValueError, match="'1' is AvgPool2d"):
        without_dead_channels(nn.Sequential(nn.Conv2d(1, 2, 3), nn.AvgPool2d(2, padding=1), nn.Conv2d(2, 1, 1)))
    with pytest.raises(ValueError, match="'1' follows a convolution without"):
        without_dead_channels(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(4, 2)))


@pytest.mark.parametrize("name", [*SHAPES, "resnet18"])
def test_csr_layers_compute_what_dense_ones_do(name):
    module = build_model(name, classes=10, width=0.15, channels=3, size=32).eval()
    linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for layer in linear:
            layer.weight *= torch.rand_like(layer.weight) < 0.1
    sparse = to_csr(module, 0.7)
    assert sum(isinstance(layer, CSRLinear) for layer in sparse.modules()) == len(linear)
    assert not any(isinstance(layer, CSRLinear) for layer in module.modules())
    same_outputs(sparse, module, torch.rand(4, 3, 32, 32))


def test_only_layers_sparse_enough_become_csr():
    layer = nn.Linear(4, 5)
    with torch.no_grad():
        layer.weight[:, :2] = 0
    assert isinstance(to_csr(layer, 0.5), CSRLinear)
    assert isinstance(to_csr(layer, 0.51), nn.Linear)


def test_csr_keeps_eight_bytes_per_weight_and_works_without_bias():
    layer = nn.Linear(6, 3, bias=False)
    with torch.no_grad():
        layer.weight[1] = 0
    sparse = CSRLinear(layer)
    assert sparse.weight.col_indices().dtype == torch.int32
    assert sparse.weight.values().numel() == 12
    same_outputs(sparse, layer, torch.randn(2, 6))
