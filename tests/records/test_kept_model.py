"""Laws of the model that a run leaves: it is the run's last sparse model to the bit, small, and readable by anyone."""

import hashlib
import json
import subprocess

import numpy as np
import pytest
import torch
from conftest import random_bools, random_vector, tiny_config
from safetensors.torch import load

from feddip_lite.core.models import build_model
from feddip_lite.core.seeds import derive
from feddip_lite.records.kept_model import model_file, read_model_file
from feddip_lite.records.store import ROOT, read_mask, read_model, read_run
from feddip_lite.train.run import run
from feddip_lite.train.setup import prepare

LARGEST_COMMITTED = 100 * 1024  # bytes; larger models stay out of the repository
RESNET = {"model": "resnet18", "width": 0.05, "clients_per_round": 2, "rounds": 1}


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_model_comes_back_bit_for_bit_packed_unless_it_is_dense(layout, tmp_path, density):
    weights, mask = random_vector(layout.size), random_bools(layout.prunable, density)
    buffers = random_vector(layout.buffer_size, seed=1)
    data = model_file(layout, weights, mask, buffers)
    assert data == model_file(layout, layout.masked(weights, mask), mask.clone(), buffers)
    (tmp_path / "model").write_bytes(data)
    kept = read_model_file(tmp_path / "model")
    assert torch.equal(kept.weights, layout.masked(weights, mask))
    assert torch.equal(kept.buffers, buffers)
    assert torch.equal(kept.mask, mask)
    stored = load(data)
    assert len(stored["values"]) == layout.size - int((~mask).sum())
    assert len(stored.get("mask", [])) == (0 if mask.all() else -(-layout.prunable // 8))


@pytest.mark.parametrize("settings", [{}, RESNET, {"method": "fedavg"}, {"method": "fedlp"}], ids=str)
def test_a_run_leaves_its_last_sparse_model_and_says_its_checksum(tmp_path, settings):
    config = tiny_config(**settings)
    run(config, results_dir=tmp_path, progress=False)
    record, kept = read_run(tmp_path, config.run_id)[1], read_model(tmp_path, config.run_id)
    file = tmp_path / f"{config.run_id}.safetensors"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == record["model_sha256"]
    counts = [torch.count_nonzero(kept.state_dict()[layer["name"]]).item() for layer in record["layers"]]
    assert counts == [layer["kept"] for layer in record["layers"]]
    assert torch.equal(kept.mask, read_mask(tmp_path, config.run_id))
    channels, size = (3, 32) if config.model == "resnet18" else (1, 28)
    shape = {"classes": 10, "width": config.width, "channels": channels, "size": size}
    module = build_model(config.model, **shape, seed=derive(config.seed, "initial weights"))
    missing, unexpected = module.load_state_dict(kept.state_dict(), strict=False)
    assert all(name.endswith("num_batches_tracked") for name in missing)
    assert not unexpected


def test_the_kept_model_has_the_accuracy_of_the_record(tmp_path):
    config = tiny_config(rounds=2)
    accuracy = run(config, results_dir=tmp_path, progress=False)["accuracy"].iloc[-1]
    module = build_model("lenet5", classes=10, width=config.width, channels=1, size=28, seed=0)
    module.load_state_dict(read_model(tmp_path, config.run_id).state_dict())
    _, clients, _ = prepare(config)
    clients.workers.close()
    with torch.no_grad():
        guessed = module.eval()(clients.data.test_images / clients.data.scale).argmax(1)
    assert float((guessed == clients.data.test_labels).double().mean()) == pytest.approx(accuracy, abs=1e-12)


def test_plain_numpy_reads_a_model_by_what_its_docstring_says(layout):
    weights, mask = random_vector(layout.size), random_bools(layout.prunable, 0.1)
    data = model_file(layout, weights, mask, torch.zeros(layout.buffer_size))
    stored, length = load(data), int.from_bytes(data[:8], "little")
    named = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["layout"])
    prunable = sum(int(np.prod(shape)) for _, shape in named["tensors"][: named["prunable"]])
    bits = np.unpackbits(stored["mask"].numpy(), count=prunable).astype(bool)
    assert bits.tolist() == mask.tolist()
    assert stored["values"][: bits.sum()].tolist() == weights[:prunable][mask].tolist()


def test_damaged_missing_and_foreign_files_are_refused_by_name(tmp_path, layout):
    config = tiny_config(rounds=1)
    run(config, results_dir=tmp_path, progress=False)
    path = tmp_path / f"{config.run_id}.safetensors"
    data = path.read_bytes()
    for bad in (b"", data[:-1], bytes([data[0] ^ 1]) + data[1:]):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=f"{path}: does not match {config.run_id}.json"):
            read_model(tmp_path, config.run_id)
        with pytest.raises(ValueError, match="damaged, or not the model of a recorded run"):
            read_model_file(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="the model of this run is not here"):
        read_model(tmp_path, config.run_id)
    with pytest.raises(FileNotFoundError, match="no such run"):
        read_model(tmp_path, "feddip_digits_0")


def test_committed_models_are_small_and_belong_to_their_records():
    command = ["git", "-C", str(ROOT), "ls-files", "results/*.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("no checkout of git")
    listed = done.stdout.split()
    assert listed
    for path in map(ROOT.joinpath, listed):
        assert path.stat().st_size < LARGEST_COMMITTED
        assert len(read_model(path.parent, path.stem).weights) > 0
