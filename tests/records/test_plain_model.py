"""Laws of kept models as plain PyTorch: zeros and accuracy are the record's, and so are every exported file's."""

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import tiny_config
from safetensors.torch import load_file
from torch import nn

import feddip_lite
from feddip_lite import load_model, load_results, run
from feddip_lite.core.models import MODELS
from feddip_lite.data.datasets import DATASETS, as_published, fit_images, load_dataset, normalise
from feddip_lite.records.plain_model import export_model, pixels_of
from feddip_lite.records.store import read_mask

MODEL = pytest.mark.parametrize("model", ["lenet5", "alexnet", "resnet18"])
RUN = {"rounds": 3, "mask_interval": 1, "clients": 4, "clients_per_round": 2, "lr": 0.05}


pytestmark = pytest.mark.usefixtures("forgetting")


def recorded(folder, model, width=0.15):
    config = tiny_config(model=model, **RUN, width=width)
    history = run(config, results_dir=folder, progress=False)
    data = load_dataset("digits")
    data = fit_images(data, 3, 32) if model != "lenet5" else data
    return config.run_id, history, data


@MODEL
def test_zeros_and_accuracy_are_the_records_and_all_layers_pytorchs(tmp_path, model):
    run_id, history, data = recorded(tmp_path, model)
    module = load_model(tmp_path, run_id)
    assert not module.training
    assert all(type(each).__module__.startswith("torch.") for each in module.modules() if not list(each.children()))
    assert all(p.grad is None and p.is_leaf and p.requires_grad for p in module.parameters())
    with torch.no_grad():
        logits = module(normalise(data.test_images, data))
    assert (logits.argmax(1) == data.test_labels).double().mean().item() == history["accuracy"].iloc[-1]
    zeros = sum(int((p == 0).sum()) for name, p in module.named_parameters() if p.dim() > 1 and "shortcut" not in name)
    assert zeros == int((~read_mask(tmp_path, run_id)).sum())
    assert torch.equal(pixels_of(tmp_path, run_id)(data.test_images[:5]), module(normalise(data.test_images[:5], data)))


def test_two_small_batches_give_the_gradient_of_one_large_batch(tmp_path):
    run_id, _, data = recorded(tmp_path, "lenet5")
    images, labels = normalise(data.train_images[:64], data), data.train_labels[:64]
    gradients = []
    for pieces in (1, 2):
        module = load_model(tmp_path, run_id)
        for x, y in zip(images.chunk(pieces), labels.chunk(pieces), strict=True):
            (nn.functional.cross_entropy(module(x), y) / pieces).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
    torch.testing.assert_close(*gradients)


@MODEL
def test_every_file_computes_what_the_model_does_for_any_number_of_images(tmp_path, model):
    run_id, _, data = recorded(tmp_path, model)
    module, images = pixels_of(tmp_path, run_id), data.test_images[:7]
    with torch.no_grad():
        expected = module(images)
    for suffix in ("safetensors", "pt2", "onnx"):
        path = tmp_path / f"out/model.{suffix}"
        assert export_model(tmp_path, run_id, path) == path.stat().st_size
    state = load_file(tmp_path / "out/model.safetensors")
    own = load_model(tmp_path, run_id).state_dict()
    assert own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in own)
    program = torch.export.load(tmp_path / "out/model.pt2").module()
    torch.testing.assert_close(program(images), expected)
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx")
    for count in (1, 7):
        (found,) = session.run(["logits"], {"images": images[:count].numpy()})
        np.testing.assert_allclose(found, expected[:count], atol=1e-4)
    once = (tmp_path / "out/model.onnx").read_bytes()
    export_model(tmp_path, run_id, tmp_path / "out/model.onnx")
    assert (tmp_path / "out/model.onnx").read_bytes() == once


def test_a_model_and_data_of_ones_own_come_back_with_what_made_them(tmp_path):
    def make(classes, channels):
        layers = nn.Conv2d(channels, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2), nn.Flatten()
        return nn.Sequential(*layers, nn.Linear(6 * 18 * 22, classes))

    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (60, 20, 24, 3), dtype=np.uint8), np.array(["up", "down"])[np.arange(60) % 2]
    config = tiny_config(**RUN, width=1.0)
    history = run(
        config,
        model=make,
        data=(images[:40], labels[:40], images[40:], labels[40:]),
        results_dir=tmp_path,
        progress=False,
    )
    (run_id,) = load_results(tmp_path)["run_id"].unique()
    model = load_model(tmp_path, run_id)
    for names in (MODELS, DATASETS):  # as in another process
        del names[next(name for name in names if name.startswith("own-"))]
    with pytest.raises(ValueError, match="model 'own-.*': is not known here; pass it as `model=`"):
        load_model(tmp_path, run_id)
    again = load_model(tmp_path, run_id, make)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    program = pixels_of(tmp_path, run_id, make)
    with torch.no_grad():
        found = program(torch.from_numpy(images[40:]).permute(0, 3, 1, 2)).argmax(1).numpy()
    names = np.array(["down", "up"])  # in ascending order
    assert (names[found] == labels[40:]).mean() == history["accuracy"].iloc[-1]
    with pytest.raises(ValueError, match="is no tensor of this model"):
        load_model(tmp_path, run_id, lambda: nn.Sequential(nn.Flatten(), nn.Linear(3, 2)))
    assert export_model(tmp_path, run_id, tmp_path / "own.onnx", make) > 0


def test_other_suffixes_and_missing_runs_are_one_line(tmp_path):
    run_id, _, _ = recorded(tmp_path, "lenet5")
    with pytest.raises(ValueError, match="model.h5: .h5 is not valid; expected .safetensors, .pt2 or .onnx"):
        export_model(tmp_path, run_id, tmp_path / "model.h5")
    with pytest.raises(FileNotFoundError, match="no such run"):
        feddip_lite.load_model(tmp_path, "nothing")


def test_the_published_normalisation_of_a_run_goes_into_its_program(tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    arrays = {f"{part}_images": draw.integers(0, 256, (200, 32, 32, 3), dtype=np.uint8) for part in ("train", "test")}
    arrays |= {f"{part}_labels": np.arange(200, dtype=np.uint8) % 100 for part in ("train", "test")}
    np.savez(tmp_path / "cifar100.npz", **arrays)
    monkeypatch.setenv("FEDDIP_DATA", str(tmp_path))
    options = {"method_options": {"normalisation": "published"}}
    config = tiny_config(dataset="cifar100", model="resnet18", width=0.05, **{**RUN, "rounds": 1}, **options)
    run_id = run(config, results_dir=tmp_path / "results", progress=False).attrs["run_id"]
    data = load_dataset("cifar100")
    images = data.test_images[:5]
    module, program = load_model(tmp_path / "results", run_id), pixels_of(tmp_path / "results", run_id)
    assert torch.equal(program(images), module(normalise(images, as_published(data))))
    assert not torch.equal(program(images), module(normalise(images, data)))
