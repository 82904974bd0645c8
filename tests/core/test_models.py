"""Laws of the models: the paper's parameter counts, output shapes, width, and who draws random numbers."""

import pytest
import torch
from torch import nn

from feddip_lite.core.flat import Layout
from feddip_lite.core.models import Dropout, build_model

COUNTS = {"lenet5": (10, 1, 28, 61706, 61470), "alexnet": (10, 3, 32, 23272266, 23262912)}
COUNTS["resnet18"] = (100, 3, 32, 11220132, 11038400)
EVERY_MODEL = pytest.mark.parametrize("name", COUNTS)


def small(name, width=0.1, seed=0, **changes):
    classes, channels, size, *_ = COUNTS[name]
    return build_model(
        name, **{"classes": classes, "channels": channels, "size": size, **changes}, width=width, seed=seed
    )


@EVERY_MODEL
def test_number_of_weights_and_of_prunable_weights_at_full_width(name):
    with torch.device("meta"):
        layout = Layout.of(small(name, width=1.0))
    assert (layout.size, layout.prunable) == COUNTS[name][3:]


def test_resnet18_has_172032_shortcut_weights_that_are_prunable_by_option():
    with torch.device("meta"):
        module = small("resnet18", width=1.0)
    with_shortcut, without = Layout.of(module, include_shortcut=True), Layout.of(module)
    assert with_shortcut.prunable - without.prunable == 172032
    assert with_shortcut.size == without.size


@EVERY_MODEL
def test_output_has_a_score_per_image_and_class(name):
    classes, channels, size, *_ = COUNTS[name]
    assert small(name)(torch.rand(3, channels, size, size)).shape == (3, classes)
    assert small(name, classes=7)(torch.rand(2, channels, size, size)).shape == (2, 7)


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (2, 16)])
def test_lenet5_takes_any_channels_and_sizes(channels, size):
    assert small("lenet5", channels=channels, size=size)(torch.rand(2, channels, size, size)).shape == (2, 10)


@EVERY_MODEL
def test_width_scales_hidden_channels_but_neither_input_nor_classes(name):
    with torch.device("meta"):
        full, half = (dict(small(name, width=width).named_parameters()) for width in (1.0, 0.5))
    last = list(full)[-1].rpartition(".")[0] + ".weight"
    assert half["conv1.weight"].shape[:2] == (full["conv1.weight"].shape[0] // 2, full["conv1.weight"].shape[1])
    assert half[last].shape == (full[last].shape[0], full[last].shape[1] // 2)
    hidden = [key for key in full if key.endswith("conv2.weight")]
    assert all(2 * a == b for key in hidden for a, b in zip(half[key].shape[:2], full[key].shape[:2], strict=True))


@EVERY_MODEL
def test_at_least_one_channel_stays_however_small_the_width(name):
    _, channels, size, *_ = COUNTS[name]
    module = small(name, width=1e-4)
    assert module.conv1.weight.shape[0] == 1
    assert module(torch.rand(2, channels, size, size)).isfinite().all()


@EVERY_MODEL
def test_initial_weights_are_a_function_of_the_seed_and_leave_the_global_generator_untouched(name):
    before = torch.random.get_rng_state()
    weights = [torch.cat([p.flatten() for p in small(name, seed=seed).parameters()]) for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(weights[0], torch.cat([p.flatten() for p in small(name, seed=1).parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@EVERY_MODEL
def test_no_layer_draws_from_the_global_generator(name):
    _, channels, size, *_ = COUNTS[name]
    module = small(name).train()
    assert not any(isinstance(layer, nn.Dropout | nn.Dropout2d | nn.AlphaDropout) for layer in module.modules())
    for layer in module.modules():
        if isinstance(layer, Dropout):
            layer.generator = torch.Generator().manual_seed(0)
    before = torch.random.get_rng_state()
    module(torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_dropout_is_a_function_of_its_generator_and_keeps_the_mean():
    layer, ones = Dropout(0.5).train(), torch.ones(100_000)
    outputs = []
    for seed in (1, 1, 2):
        layer.generator = torch.Generator().manual_seed(seed)
        outputs.append(layer(ones))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert set(outputs[0].unique().tolist()) == {0.0, 2.0}
    assert outputs[0].mean().item() == pytest.approx(1, abs=0.02)


def test_dropout_is_the_identity_in_evaluation_mode():
    x = torch.rand(10)
    assert torch.equal(Dropout(0.5).eval()(x), x)


def test_alexnet_has_dropout_before_its_first_two_linear_layers():
    assert sum(isinstance(layer, Dropout) and layer.p == 0.5 for layer in small("alexnet").modules()) == 2


def test_lenet5_pools_before_relu_to_the_same_function():
    module, images = small("lenet5", width=1.0), torch.rand(4, 1, 28, 28)
    x = torch.max_pool2d(torch.relu(module.conv1(images)), 2)
    x = torch.max_pool2d(torch.relu(module.conv2(x)), 2).flatten(1)
    expected = module.fc3(torch.relu(module.fc2(torch.relu(module.fc1(x)))))
    assert torch.equal(module(images), expected)
