"""Laws of `make gpu`, rehearsed on the CPU: every step leaves what it found, in time; the next slice goes on."""

import json
import tarfile
import time

import numpy as np
import pytest
import torch
from conftest import tiny_config
from test_setup import tool

from feddip_lite.core.flat import FlatModel, Layout
from feddip_lite.core.models import build_model
from feddip_lite.data.datasets import load_dataset
from feddip_lite.data.files import KEYS, checksum
from feddip_lite.records.store import load_results

gpu = tool("gpu")
QUEUE = """defaults: {dataset: digits, width: 0.3, clients: 8, clients_per_round: 2, local_epochs: 1}
queue:
  - {method: [fedavg, feddip], rounds: 3}
  - {rounds: 1000000}
  - {dataset: cifar10, model: alexnet, rounds: 3}
"""


@pytest.fixture
def queue(tmp_path):
    path = tmp_path / "queue.yaml"
    path.write_text(QUEUE)
    return path


@pytest.mark.slow
def test_a_rehearsal_does_every_step_in_time_and_the_next_slice_repeats_no_run(tmp_path, monkeypatch, queue):
    monkeypatch.setenv("FEDDIP_DATA", str(tmp_path / "data"))
    given = ["--device=cpu", f"--queue={queue}", "--commit=0123abc"]
    begin = time.monotonic()
    assert gpu.main([*given, "--minutes=4", f"--out={tmp_path / 'one'}"]) == 0
    assert time.monotonic() - begin < 240
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    assert list(report) == ["facts", "tests", "correctness", "three_rounds", "ways", "pace", "benchmark", "runs"]
    assert report["facts"]["found"]["commit"] == "0123abc" and report["tests"]["found"]["status"] == 0
    float32 = [row for row in report["correctness"]["found"] if row["precision"] == "float32"]
    limits = {"lenet5": 1e-4, "alexnet": 1e-4, "resnet18": 3e-2}  # BatchNorm amplifies rounding
    assert len(float32) == 6
    assert all(row["gradient"] < limits[row["model"]] and row["loss"] < 1e-6 for row in float32)
    for row in report["three_rounds"]["found"]:
        together = 0.2 if row["model"] == "resnet18" else 1e-4
        assert row["largest_weight_difference"] <= (0 if row["workers"] == 1 else together), row
    assert report["ways"]["found"] and not any("failed" in row for row in report["ways"]["found"])
    found = report["runs"]["found"]
    assert len(found["done"]) == 2 and sorted(text.split()[0] for text in found["left"].values()) == ["its", "would"]
    with tarfile.open(tmp_path / "one" / "results.tar") as archive:
        assert {name.rpartition(".")[2] for name in archive.getnames()} == {"json", "csv", "mask", "safetensors"}
    assert (
        gpu.main([*given, "--minutes=4", f"--out={tmp_path / 'two'}", f"--resume={tmp_path / 'one/results.tar'}"]) == 0
    )
    one, two = (load_results(tmp_path / name / "results") for name in ("one", "two"))
    assert one.equals(two)  # to the second: read, not computed


def test_a_step_that_fails_loses_no_other(tmp_path, capsys):
    now = gpu.Slice(1, tmp_path, "cpu")
    now.step("bad", lambda: 1 / 0)
    now.step("good", lambda: 2)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["bad"]["found"] == {"failed": "ZeroDivisionError: division by zero"} and report["good"]["found"] == 2
    assert now.failed


def test_the_queue_is_trained_in_the_way_that_was_found_best(tmp_path):
    now = gpu.Slice(1, tmp_path, "cuda")
    assert gpu.workers_for(now, "lenet5") == "auto"
    rows = [("lenet5", "together", 1.0), ("lenet5", "each by itself", 2.0), ("alexnet", "each by itself", 2.0)]
    now.report["ways"] = {"found": [{"model": m, "way": way, "train_s": seconds} for m, way, seconds in rows]}
    now.report["ways"]["found"].append({"model": "alexnet", "way": "together", "failed": "RuntimeError: no"})
    assert [gpu.workers_for(now, model) for model in gpu.MODELS] == ["auto", 1, "auto"]
    now.report["ways"] = {"found": {"failed": "all of it"}}
    assert gpu.workers_for(now, "lenet5") == "auto"


def test_a_run_out_of_time_leaves_a_checkpoint_in_the_archive(tmp_path):
    now = gpu.Slice(10 / 60 + 0.02, tmp_path, "cpu")  # ten seconds are kept for the way back
    config = tiny_config(rounds=500)
    now.report["pace"] = {
        "found": [{"model": "lenet5", "dataset": "digits", "width": 0.3, "first_s": 0, "round_s": -1}]
    }
    found = gpu.runs(now, [config])
    assert found["done"] == [] and "out of time after" in found["left"][config.run_id]
    with tarfile.open(tmp_path / "results.tar") as archive:
        assert archive.getnames() == [f"{config.run_id}.checkpoint"]
    gpu.unpack(tmp_path / "results.tar", tmp_path / "next")
    assert (tmp_path / "next" / "results" / f"{config.run_id}.checkpoint").exists()
    (tmp_path / "results.tar").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="results.tar: damaged"):
        gpu.unpack(tmp_path / "results.tar", tmp_path / "next")


def test_a_data_set_travels_in_pieces_in_several_uploads(tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    arrays = {
        f"{part}_images": draw.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        for part, n in (("train", 50), ("test", 20))
    }
    arrays |= {f"{part}_labels": draw.integers(0, 10, n, dtype=np.uint8) for part, n in (("train", 50), ("test", 20))}
    (tmp_path / "here").mkdir()
    np.savez(tmp_path / "here" / "cifar10.npz", **{key: arrays[key] for key in KEYS})
    monkeypatch.setattr(gpu, "PIECE_SAMPLES", 16)
    monkeypatch.setenv("FEDDIP_DATA", str(tmp_path / "here"))
    pieces = gpu.split("cifar10", tmp_path / "pieces")
    assert len(pieces) == 4 + 2
    monkeypatch.setenv("FEDDIP_DATA", str(tmp_path / "there"))
    for count in range(len(pieces)):
        (tmp_path / "sent").mkdir(exist_ok=True)
        (tmp_path / "sent" / pieces[count].name).write_bytes(pieces[count].read_bytes())
        made = gpu.join(tmp_path / "sent")
        assert len(made) == (count == len(pieces) - 1)
    assert load_dataset("cifar10").sha256 == checksum(arrays)
    (tmp_path / "sent" / pieces[0].name).write_bytes(pieces[0].read_bytes()[:-50])
    with pytest.raises(ValueError, match="000.npz: damaged piece .*; send it again"):
        gpu.join(tmp_path / "sent")


@pytest.mark.parametrize(
    "given",
    [["--minutes=0"], ["--minutes=soon"], ["--queue=nowhere.yaml"], ["--steps=dance"], ["--processes=0"]],
)
def test_bad_input_is_one_line(given, tmp_path, capsys):
    assert gpu.main([*given, "--device=cpu", f"--out={tmp_path}"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_several_programs_record_the_whole_queue_in_one_folder(tmp_path, queue):
    queue.write_text("".join(QUEUE.splitlines(keepends=True)[:3]))
    given = ["--device=cpu", f"--queue={queue}", "--steps=facts,runs", "--processes=2", "--minutes=2"]
    assert gpu.main([*given, f"--out={tmp_path}"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [*report] == ["facts", "runs"] and report["runs"]["found"]["status"] == [0, 0]
    assert len(report["runs"]["found"]["done"]) == load_results(tmp_path / "results")["run_id"].nunique() == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_there_is_one_line(tmp_path, capsys):
    assert gpu.main([f"--out={tmp_path}"]) == 2
    assert "torch sees no GPU here; expected cpu, for a rehearsal" in capsys.readouterr().err


def test_a_flat_model_of_float64_has_the_exact_gradient():
    module = build_model("lenet5", classes=10, width=0.3, channels=1, size=28)
    model = FlatModel(module, Layout.of(module), dtype=torch.float64)
    assert {model.weights.dtype, model.gradient.dtype, next(module.parameters()).dtype} == {torch.float64}
    images, labels = torch.rand(4, 1, 28, 28, dtype=torch.float64), torch.arange(4)
    loss = model.kernels.loss_and_gradient(images, labels)
    step, direction = 1e-6, torch.randn(model.layout.size, dtype=torch.float64)
    slope = float(model.gradient @ direction)
    model.weights.add_(step * direction)
    assert (float(model.kernels.loss_and_gradient(images, labels)) - float(loss)) / step == pytest.approx(
        slope, rel=1e-3
    )
