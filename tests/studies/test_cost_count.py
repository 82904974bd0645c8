"""Laws of the cost account: FLOPs, memory and bytes by hand and as measured by hooks; times are positive."""

from dataclasses import replace

import pytest
import torch
from conftest import random_bools, state_of, tiny_config, tiny_module
from torch import nn

from feddip_lite.core.flat import Layout
from feddip_lite.core.message import Message, encode, num_bytes
from feddip_lite.core.models import build_model
from feddip_lite.studies.cost.count import (
    activation_bytes,
    client_memory,
    flops,
    latency,
    packed_bytes,
    training_flops,
)

# Output positions times weights, twice: 28*28*(6*25), 10*10*(16*6*25), 400*120, 120*84, 84*10.
LENET5 = {
    "conv1.weight": 235200,
    "conv2.weight": 480000,
    "fc1.weight": 96000,
    "fc2.weight": 20160,
    "fc3.weight": 1680,
}


def layout_of(name="lenet5", width=1.0, channels=1, size=28):
    module = build_model(name, classes=10, width=width, channels=channels, size=size)
    return module, Layout.of(module, image_shape=(channels, size, size))


def test_forward_flops_of_lenet5_by_hand():
    assert flops(layout_of()[1]) == LENET5


@pytest.mark.parametrize("name", ["lenet5", "alexnet", "resnet18"])
def test_forward_flops_are_what_hooks_count(name):
    module, layout = layout_of(name, 0.1, 3, 32)
    counted = 0

    def count(layer, inputs, output):
        nonlocal counted
        counted += 2 * output[0].numel() * layer.weight[0].numel()

    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    with torch.no_grad():
        module.eval()(torch.zeros(4, 3, 32, 32))
    assert sum(flops(layout).values()) == counted


def test_sparse_flops_are_two_uses_per_kept_weight_and_shortcuts_stay_dense():
    _, layout = layout_of("resnet18", 0.1, 3, 32)
    mask = random_bools(layout.prunable, 0.2)
    uses = torch.cat([torch.full((slot.stop - slot.start,), slot.uses) for slot in layout.prunable_slots])
    sparse, dense = flops(layout, mask), flops(layout)
    shortcuts = {name: count for name, count in dense.items() if "shortcut" in name}
    assert len(shortcuts) == 3
    assert sum(sparse.values()) == int((2 * uses * mask).sum()) + sum(shortcuts.values())
    assert flops(layout, torch.ones_like(mask)) == dense


def test_flops_refuse_a_layout_without_image_shape_and_a_mask_of_another_length():
    module, layout = layout_of()
    with pytest.raises(ValueError, match="image_shape"):
        flops(Layout.of(module))
    with pytest.raises(ValueError, match="mask: shape"):
        flops(layout, torch.ones(3, dtype=torch.bool))


def test_training_flops_by_hand_and_error_feedback_keeps_the_weight_gradient_dense():
    _, layout = layout_of()
    config = tiny_config(local_epochs=2)
    forward, first = sum(LENET5.values()), LENET5["conv1.weight"]
    dense = training_flops(layout, config, 10)
    assert dense["total"] == 2 * 10 * (3 * forward - first)
    mask = random_bools(layout.prunable, 0.1)
    sparse = training_flops(layout, config, 10, mask)
    feedback = training_flops(layout, config, 10, mask, error_feedback=True)
    assert sparse["weight_gradient"] == sparse["forward"] == 20 * sum(flops(layout, mask).values())
    assert feedback == {**sparse, "weight_gradient": dense["weight_gradient"], "total": feedback["total"]}
    assert feedback["total"] == sum(value for name, value in feedback.items() if name != "total")


def test_activations_kept_by_hand():
    module = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.Sigmoid())
    # The input, what ReLU gives (kept by it and by the next layer, once), what the sigmoid gives.
    assert activation_bytes(module, torch.rand(7, 5)) == 4 * 7 * (5 + 4 + 3)


def test_measuring_activations_grows_with_the_batch_and_changes_nothing():
    module = tiny_module().train()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    small, large = (activation_bytes(module, torch.rand(batch, 1, 6, 6)) for batch in (4, 8))
    # BatchNorm keeps two statistics per channel, whatever the batch.
    assert large - small == small - 4 * 2 * 3
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_client_memory_counts_the_vectors_a_client_needs():
    module = tiny_module()
    layout, images = Layout.of(module), torch.rand(4, 1, 6, 6)
    mask = random_bools(layout.prunable)
    rest = activation_bytes(module, images) + 4 * layout.buffer_size

    def total(*args, **options):
        parts = client_memory(module, layout, images, *args, **options)
        assert parts.pop("total") == sum(parts.values())
        return sum(parts.values()) - rest

    assert total() == 8 * layout.size
    assert total(mask) == 8 * layout.size + layout.prunable
    assert total(mask, error_feedback=True) == 12 * layout.size + layout.prunable


def test_packed_bytes_are_the_length_of_the_message_and_a_full_mask_is_free():
    layout = Layout.of(tiny_module())
    state = state_of(layout, random_bools(layout.prunable, 0.2))
    values = layout.pack(state.weights, state.mask)
    message = Message(values, state.mask, {"buffers": state.buffers})
    assert packed_bytes(layout, state) == len(encode(message)) == num_bytes(message)
    dense = replace(state, mask=torch.ones_like(state.mask))
    assert packed_bytes(layout, dense) == len(encode(Message(state.weights, None, {"buffers": state.buffers})))


def test_latency_times_every_module_in_evaluation_mode():
    modules = {"a": nn.Linear(4, 4), "b": nn.Dropout(0.5).train()}
    times = latency(modules, torch.rand(2, 4), repeats=5)
    assert list(times) == ["a", "b"]
    assert all(0 < t["lower"] <= t["median"] <= t["upper"] for t in times.values())
    assert not modules["b"].training
