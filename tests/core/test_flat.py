"""Laws of the flat vectors: where tensors live, packing and its inverse, parameters and gradients as views."""

import pytest
import torch
from conftest import random_bools, random_vector, tiny_module
from torch.nn import functional as F

from feddip_lite.core.flat import FlatModel, Layout


def test_prunable_tensors_come_first_and_all_tensors_cover_the_vector_once(layout):
    assert [slot.name for slot in layout.slots] == [
        "conv.weight",
        "linear.weight",
        "norm.weight",
        "norm.bias",
        "linear.bias",
    ]
    assert [(slot.start, slot.stop) for slot in layout.slots] == [
        (0, 27),
        (27, 219),
        (219, 222),
        (222, 225),
        (225, 229),
    ]
    assert [slot.name for slot in layout.prunable_slots] == ["conv.weight", "linear.weight"]
    assert (layout.prunable, layout.size) == (219, 229)


def test_buffers_are_the_running_means_and_variances_without_the_counter(layout):
    assert [slot.name for slot in layout.buffer_slots] == ["norm.running_mean", "norm.running_var"]
    assert layout.buffer_size == 6


def test_model_without_batchnorm_has_an_empty_buffer_vector():
    assert Layout.of(torch.nn.Linear(3, 2)).buffer_size == 0


@pytest.mark.parametrize("density", [0.0, 0.03, 0.5, 0.97, 1.0])
def test_unpack_of_pack_is_the_masked_vector(layout, density):
    for seed in range(10):
        weights, mask = random_vector(layout.size, seed), random_bools(layout.prunable, density, seed)
        packed = layout.pack(weights, mask)
        assert packed.shape == (int(mask.sum()) + layout.size - layout.prunable,)
        assert torch.equal(layout.unpack(packed, mask), layout.masked(weights, mask))


def test_pack_of_unpack_is_the_packed_vector(layout):
    mask = random_bools(layout.prunable, 0.4)
    values = random_vector(int(mask.sum()) + layout.size - layout.prunable)
    assert torch.equal(layout.pack(layout.unpack(values, mask), mask), values)


def test_without_a_mask_the_vector_travels_whole(layout):
    weights = random_vector(layout.size)
    assert torch.equal(layout.pack(weights, None), weights)
    assert torch.equal(layout.unpack(weights, None), weights)


def test_dense_values_unpack_to_themselves_whatever_the_mask(layout):
    weights = random_vector(layout.size)
    unpacked = layout.unpack(weights, random_bools(layout.prunable, 0.3))
    assert torch.equal(unpacked, weights)
    assert unpacked.data_ptr() != weights.data_ptr()


@pytest.mark.parametrize("wrong", [-1, 1, -10])
def test_unpack_refuses_a_wrong_number_of_values(layout, wrong):
    mask = random_bools(layout.prunable, 0.4)
    count = int(mask.sum()) + layout.size - layout.prunable
    with pytest.raises(ValueError, match=f"values: {count + wrong} .*{count} or all {layout.size}"):
        layout.unpack(torch.zeros(count + wrong), mask)
    with pytest.raises(ValueError, match="values"):
        layout.unpack(torch.zeros(layout.size + wrong), None)
    with pytest.raises(ValueError, match="values"):
        layout.unpack(torch.zeros(1, layout.size), None)


def test_masked_plus_residual_equals_dense(layout):
    weights, mask = random_vector(layout.size), random_bools(layout.prunable, 0.3)
    masked, pruned = layout.masked(weights, mask), layout.masked(weights, ~mask)
    residual = weights - masked
    assert torch.equal(masked + residual, weights)
    assert torch.equal(residual[: layout.prunable], pruned[: layout.prunable])
    assert torch.count_nonzero(residual[layout.prunable :]) == 0


def test_masked_zeroes_pruned_coordinates_only_and_leaves_its_input(layout):
    weights, mask = random_vector(layout.size), random_bools(layout.prunable, 0.3)
    before = weights.clone()
    masked = layout.masked(weights, mask)
    everywhere = torch.cat([mask, torch.ones(layout.size - layout.prunable, dtype=torch.bool)])
    assert torch.equal(masked, torch.where(everywhere, before, torch.zeros(())))
    assert torch.equal(weights, before)


def test_flat_model_starts_with_its_modules_weights_in_layout_order(layout):
    module = tiny_module(seed=3)
    parameters = dict(tiny_module(seed=3).named_parameters())
    flat = FlatModel(module, layout).weights
    assert torch.equal(flat, torch.cat([parameters[slot.name].detach().flatten() for slot in layout.slots]))


def test_writing_the_flat_weights_changes_the_output_of_the_module(model):
    model.module.eval()
    images = torch.rand(2, 1, 6, 6)
    before = model.module(images).detach()
    model.load(random_vector(model.layout.size), None)
    after = model.module(images).detach()
    assert not torch.equal(before, after)
    parameters = {slot.name: slot.of(random_vector(model.layout.size)) for slot in model.layout.slots}
    plain = tiny_module().eval()
    plain.load_state_dict(parameters, strict=False)
    assert torch.equal(after, plain(images))


def test_load_sets_the_parameters_to_masked_weights_for_bool_and_float_masks(model):
    weights, mask = random_vector(model.layout.size), random_bools(model.layout.prunable)
    for form in (mask, mask.float()):
        model.load(torch.zeros_like(weights), None)
        model.load(weights, form)
        assert torch.equal(model.weights, model.layout.masked(weights, mask))
        assert torch.equal(dict(model.module.named_parameters())["linear.weight"].flatten(), model.weights[27:219])


def test_flat_gradient_equals_the_gradient_of_a_plain_module(model):
    images, labels = torch.rand(5, 1, 6, 6), torch.tensor([0, 1, 2, 3, 0])
    plain = tiny_module()
    for module in (model.module, plain):
        F.cross_entropy(module(images), labels).backward()
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    assert torch.equal(model.gradient, torch.cat([gradients[slot.name].flatten() for slot in model.layout.slots]))


def test_flat_buffers_follow_the_batchnorm_statistics_and_set_them(model):
    images = torch.rand(5, 1, 6, 6)
    plain = tiny_module()
    for module in (model.module, plain):
        module(images)
    assert torch.equal(model.buffers, torch.cat([plain.norm.running_mean, plain.norm.running_var]))
    model.load(model.weights.clone(), None, torch.arange(6.0))
    assert torch.equal(model.module.norm.running_var, torch.tensor([3.0, 4.0, 5.0]))
