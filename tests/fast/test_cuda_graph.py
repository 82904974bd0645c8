"""Laws of recordings, with a recorder that runs the function again where a GPU would replay a graph."""

from dataclasses import replace

import pytest
import torch
from conftest import tiny_config, tiny_data

from feddip_lite.core.autograd import Autograd
from feddip_lite.core.flat import FlatModel, Layout
from feddip_lite.core.models import build_model
from feddip_lite.core.plan import LocalPlan
from feddip_lite.fast.cuda_graph import CudaGraph
from feddip_lite.train.client import local_update


class Recorder:
    """Runs `function` four times before the first replay, as capturing does; counts what it recorded."""

    def __init__(self):
        self.recorded = 0

    def __call__(self, function, generators):
        self.recorded += 1
        for _ in range(3):
            function()
        result = function()
        return result, lambda: result.copy_(function())


def with_dropout():
    module = build_model("alexnet", classes=4, width=0.05, channels=3, size=32)
    return FlatModel(module, Layout.of(module))


def trained(model):
    data = tiny_data()
    if model.layout.slots[0].shape[1] == 3:
        data = replace(data, train_images=torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8))
    start = 0.1 * torch.randn(model.layout.size, generator=torch.Generator().manual_seed(1))
    plan = LocalPlan(start, buffers=torch.ones(model.layout.buffer_size))
    return local_update(model, plan, data, torch.arange(12), tiny_config(batch_size=5, local_epochs=3), 0, 0)


@pytest.mark.parametrize("kind", ["batchnorm", "dropout"])
def test_training_by_recordings_is_training_by_autograd_to_the_bit(kind, model):
    models = [model, model] if kind == "batchnorm" else [with_dropout(), with_dropout()]
    torch.manual_seed(5)
    plain = trained(models[0])
    torch.manual_seed(5)
    models[1].kernels = CudaGraph(models[1], "float32", Recorder())
    recorded = trained(models[1])
    assert torch.equal(recorded.weights, plain.weights)
    assert torch.equal(recorded.buffers, plain.buffers)
    assert torch.equal(recorded.losses, plain.losses)


def test_every_batch_shape_is_recorded_once(model):
    recorder = Recorder()
    model.kernels = CudaGraph(model, "float32", recorder)
    trained(model)
    assert recorder.recorded == 2  # batches of 5 and the last of 2
    trained(model)
    assert recorder.recorded == 2


def test_losses_of_different_steps_do_not_share_memory(model):
    captured = CudaGraph(model, "float32", Recorder())
    images, labels = torch.rand(3, 1, 6, 6), torch.tensor([0, 1, 2])
    first = captured.loss_and_gradient(images, labels)
    value = first.clone()
    second = captured.loss_and_gradient(1 - images, labels)
    assert torch.equal(first, value)
    assert not torch.equal(first, second)


def test_evaluation_is_recorded_once_per_shape_and_is_the_modules(model):
    recorder = Recorder()
    captured, eager = CudaGraph(model, "float32", recorder), Autograd(model.module, model.gradient)
    model.module.eval()
    with torch.inference_mode():
        for count in (3, 5, 3, 5):
            images = torch.rand(count, 1, 6, 6)
            assert torch.equal(captured.logits(images), eager.logits(images))
        assert recorder.recorded == 2
        first = captured.logits(images)
        value = first.clone()
        captured.logits(1 - images)
        assert torch.equal(first, value)
    images = torch.rand(3, 1, 6, 6)
    assert captured.logits(images).requires_grad  # elsewhere gradients may be asked for
    model.module.train()
    with torch.inference_mode():
        captured.logits(images)
    assert recorder.recorded == 2


def test_logits_are_the_modules(model):
    images = torch.rand(3, 1, 6, 6)
    model.module.eval()
    expected = Autograd(model.module, model.gradient).logits(images)
    assert torch.equal(CudaGraph(model, "float32", Recorder()).logits(images), expected)
