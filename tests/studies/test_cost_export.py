"""Laws of exported models: the module is what the server evaluates, its file computes the same with PyTorch alone."""

import io
import subprocess
import sys

import pytest
import torch
from conftest import tiny_config
from torch import nn

from feddip_lite.core.models import build_model
from feddip_lite.data.datasets import normalise
from feddip_lite.records.kept_model import model_file, read_model_file
from feddip_lite.records.plain_model import OfPixels, program
from feddip_lite.studies.cost.measure import sparse_model
from feddip_lite.studies.cost.shrink import without_dead_channels
from feddip_lite.train.evaluate import evaluate
from feddip_lite.train.setup import layout_of

EVERY_MODEL = pytest.mark.parametrize("name", ["lenet5", "alexnet", "resnet18"])


@pytest.fixture
def started(federation):
    """`started(name)`: (the sparse model before round 0, state, clients, config) at sparsity 0.9."""

    def make(name: str):
        width, shared = 0.1 if name == "alexnet" else 0.3, {"erk": "shared"}
        config = tiny_config(model=name, width=width, initial_sparsity=0.9, method_options=shared, workers=1)
        state, clients, _ = federation(config)
        return sparse_model(state, clients.data, config), state, clients, config

    return make


def program_of(module, data):
    return program(OfPixels(module, data), torch.zeros(2, *data.train_images.shape[1:], dtype=torch.uint8), ".pt2")


def logits_of(module, images, data):
    with torch.no_grad():
        return module(normalise(images, data))


@EVERY_MODEL
def test_the_sparse_model_is_what_the_server_evaluates(name, started):
    module, state, clients, _ = started(name)
    data, few = clients.data, torch.arange(20)
    parts = (state.weights, state.mask, state.buffers)
    expected, _ = clients.workers.submit(evaluate, *parts, data, few).result()
    logits = logits_of(module, data.test_images[few], data)
    losses = nn.functional.cross_entropy(logits, data.test_labels[few], reduction="none")
    torch.testing.assert_close(losses, expected)


@EVERY_MODEL
def test_the_file_of_a_sparse_model_gives_the_same_outputs_with_its_masks_zeros_in_fewer_bytes(name, started, tmp_path):
    module, state, clients, config = started(name)
    layout, full = layout_of(module, config), torch.ones_like(state.mask)
    sparse, dense = (model_file(layout, state.weights, mask, state.buffers) for mask in (state.mask, full))
    assert len(dense) - len(sparse) == 4 * int((~state.mask).sum()) - -(-layout.prunable // 8) - header(dense, sparse)
    (tmp_path / "model.safetensors").write_bytes(sparse)
    kept = read_model_file(tmp_path / "model.safetensors")
    assert torch.equal(kept.weights[: layout.prunable] != 0, state.mask)
    channels, size = clients.data.train_images.shape[1:3]
    loaded = build_model(name, classes=10, width=config.width, channels=channels, size=size, seed=1).eval()
    loaded.load_state_dict(kept.state_dict(), strict=False)
    images = clients.data.test_images[:7]
    assert torch.equal(logits_of(loaded, images, clients.data), logits_of(module, images, clients.data))


def header(dense: bytes, sparse: bytes) -> int:
    """By how much the sparse file's header, which names one tensor more, is longer."""
    return int.from_bytes(sparse[:8], "little") - int.from_bytes(dense[:8], "little")


SCRIPT = """
import sys
sys.modules["feddip_lite"] = None  # whoever asks for it gets an ImportError
import torch
images = torch.load("images.pt", weights_only=True)
logits = torch.export.load("model.pt2").module()(images)
torch.save(logits.detach(), "logits.pt")
"""


@EVERY_MODEL
def test_a_program_runs_on_any_number_of_raw_images_where_this_package_cannot_be_imported(name, started, tmp_path):
    module, _, clients, _ = started(name)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    (tmp_path / "model.pt2").write_bytes(program_of(module, clients.data))
    images = clients.data.test_images[:7].clone()
    torch.save(images, tmp_path / "images.pt")
    subprocess.run([sys.executable, "-I", "-W", "error", "-c", SCRIPT], cwd=tmp_path, check=True)
    expected = logits_of(module, images, clients.data)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt", weights_only=True), expected, atol=1e-5, rtol=1e-5)
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(loaded(images[:1]), expected[:1], atol=1e-5, rtol=1e-5)
    operators = {str(node.target) for node in loaded.graph.nodes if node.op == "call_function"}
    assert "aten.linear.default" in operators and all(operator.startswith("aten.") for operator in operators)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    values = loaded.state_dict()
    assert all(torch.equal(values[f"module.{key}"], before[key]) for key in before if key.endswith("weight"))


def test_a_shrunk_model_is_a_smaller_program_and_the_same_model_the_same_file(started, tmp_path):
    module, _, clients, _ = started("lenet5")
    with torch.no_grad():
        module.conv2.weight[0] = 0
    smaller = without_dead_channels(module)
    once, again, whole = (program_of(each, clients.data) for each in (smaller, smaller, module))
    assert once == again and len(once) < len(whole)
    assert str(tmp_path.cwd()).encode() not in whole  # where the code lies is nobody's business
    images = clients.data.test_images[:3]
    loaded = torch.export.load(io.BytesIO(once)).module()
    torch.testing.assert_close(loaded(images), logits_of(module, images, clients.data), atol=1e-5, rtol=1e-5)
