"""Laws of exported models: every value comes back, and whoever has PyTorch alone can run them."""

import re
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import tiny_config
from torch import nn

from feddip_lite.core.models import ResNet18
from feddip_lite.data.datasets import normalise
from feddip_lite.studies.cost.count import export, load_exported, sparse_model
from feddip_lite.studies.cost.export import FORMAT
from feddip_lite.studies.cost.shrink import plain, to_csr, without_dead_channels
from feddip_lite.train.evaluate import evaluate

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


@EVERY_MODEL
def test_the_sparse_model_is_what_the_server_evaluates(name, started):
    module, state, clients, _ = started(name)
    data, few = clients.data, torch.arange(20)
    parts = (state.weights, state.mask, state.buffers)
    expected = clients.workers.submit(evaluate, *parts, data, few).result()
    with torch.no_grad():
        logits = module(normalise(data.test_images[few], data))
    losses = nn.functional.cross_entropy(logits, data.test_labels[few], reduction="none")
    torch.testing.assert_close(losses, expected.losses)


@EVERY_MODEL
def test_export_and_load_give_every_value_back(name, started, tmp_path):
    module, _, clients, config = started(name)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    size = export(tmp_path / "new" / "model.pt", module, clients.data, config)
    assert size == (tmp_path / "new" / "model.pt").stat().st_size
    loaded = load_exported(tmp_path / "new" / "model.pt")
    assert not loaded.training
    assert type(loaded) is (ResNet18 if name == "resnet18" else nn.Sequential)
    for weights in (loaded.state_dict(), module.state_dict()):
        assert list(weights) == list(before)
        assert all(
            torch.equal(value, before[key]) and value.dtype == before[key].dtype for key, value in weights.items()
        )


def test_a_shrunk_model_comes_back_too_and_the_same_model_is_the_same_file(started, tmp_path):
    module, _, clients, config = started("lenet5")
    with torch.no_grad():
        module.conv2.weight[0] = 0
    smaller = without_dead_channels(module)
    for name in ("a.pt", "b.pt"):
        export(tmp_path / name, smaller, clients.data, config)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    loaded = load_exported(tmp_path / "a.pt").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in smaller.state_dict().items())


def test_sparse_tensors_make_the_file_smaller(started, tmp_path):
    module, state, clients, config = started("lenet5")
    sparse = export(tmp_path / "sparse.pt", module, clients.data, config)
    for parameter in module.parameters():
        nn.init.ones_(parameter)
    dense = export(tmp_path / "dense.pt", module, clients.data, config)
    pruned = int((~state.mask).sum())
    kept = int(state.mask.sum())
    assert 4 * pruned - 4 * kept - 4096 < dense - sparse <= 4 * pruned


@EVERY_MODEL
def test_the_lines_in_the_docstring_run_where_this_package_cannot_be_imported(name, started, tmp_path):
    module, _, clients, config = started(name)
    small = module if name == "resnet18" else without_dead_channels(module)
    export(tmp_path / "model.pt", small, clients.data, config)
    images = clients.data.test_images[:7]
    torch.save(images, tmp_path / "images.pt")
    chain, residual = re.findall(r":\n\n((?: {8}.*\n|\n)+)", export.__doc__)
    lines = textwrap.dedent(chain)
    if name == "resnet18":
        lines = lines.partition("layers = [")[0] + textwrap.dedent(residual)
    script = "import sys\nsys.modules['feddip_lite'] = None  # whoever asks for it gets an ImportError\n"
    script += "import torch\nimages = torch.load('images.pt', weights_only=True)\n" + lines
    script += "\ntorch.save(logits.detach(), 'logits.pt')"
    subprocess.run([sys.executable, "-I", "-W", "error", "-c", script], cwd=tmp_path, check=True)
    with torch.no_grad():
        expected = module(normalise(images, clients.data))
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt", weights_only=True), expected, atol=1e-5, rtol=1e-5)


def test_what_no_file_holds_is_refused_and_nothing_is_written(started, tmp_path):
    module, _, clients, config = started("lenet5")
    with pytest.raises(ValueError, match="'fc1' is CSRLinear"):
        export(tmp_path / "model.pt", to_csr(plain(module), 0.5), clients.data, config)
    with pytest.raises(ValueError, match="'1' is Softmax; expected one of Conv2d"):
        export(tmp_path / "model.pt", nn.Sequential(nn.Linear(2, 2), nn.Softmax(1)), clients.data, config)
    assert not list(tmp_path.iterdir())


def test_files_that_are_damaged_or_none_of_ours_are_named(started, tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"weights": {}}, path)
    with pytest.raises(ValueError, match="model.pt: not an exported model"):
        load_exported(path)
    module, _, clients, config = started("lenet5")
    export(path, module, clients.data, config)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="model.pt: damaged"):
        load_exported(path)
    with pytest.raises(FileNotFoundError):
        load_exported(tmp_path / "none.pt")


@pytest.mark.parametrize(
    "content",
    [
        {"layers": [("1", "Softmax", {})], "weights": {}},
        {"layers": [("1", "Flatten", {})]},
        {"layers": [("1", "Flatten", {})], "weights": {"2.bias": torch.ones(1)}},
        {"layers": [("1", "Linear", {"strange": 1})], "weights": {}},
        {"model": "vgg", "arguments": {}, "weights": {}},
    ],
)
def test_a_file_in_our_format_that_is_no_model_is_named(content, tmp_path):
    torch.save({"format": FORMAT, **content}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="model.pt: not a model that `export` wrote"):
        load_exported(tmp_path / "model.pt")
