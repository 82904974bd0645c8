"""Laws of recorded runs: exact round trips, damage is named, headline and interval, writes whole or not at all."""

import json
import math
import os
import re
import subprocess
import sys
import tomllib

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import FAST, environment, names, tiny_config
from scipy import stats

import feddip_lite
from feddip_lite import load_results, run
from feddip_lite.records.store import (
    COLUMNS,
    INTEGER_COLUMNS,
    ROOT,
    atomic_write,
    headline,
    read_mask,
    read_run,
    save_run,
)
from feddip_lite.report.statistics import interval


def history_of(rounds=15, seed=0, **columns):
    """A made-up history with awkward numbers: halves of the last bit, tiny and huge values, NaN."""
    draw = np.random.default_rng(seed)
    table = {name: draw.random(rounds) * 10.0 ** draw.integers(-300, 300, rounds) for name in COLUMNS}
    table |= {"round": np.arange(rounds), "accuracy": draw.random(rounds), "local_accuracy": [math.nan] * rounds}
    table |= {name: draw.integers(0, 2**50, rounds) for name in INTEGER_COLUMNS[1:]}
    table["lr"] = 0.1 * 0.998 ** np.arange(rounds)
    return pd.DataFrame({**table, **columns})


def save(folder, config=None, history=None, skipped=()):
    config = config or tiny_config()
    save_run(folder, config.resolved(), history_of() if history is None else history, {"package": "0"}, list(skipped))
    return config.run_id


def test_history_read_back_is_exact(tmp_path):
    history = history_of(rounds=300)
    read, record = read_run(tmp_path, save(tmp_path, history=history))
    assert read.equals(history)
    assert list(read.columns) == COLUMNS
    assert record["provenance"] == {"package": "0"}


def test_record_holds_the_last_row_the_mean_of_the_last_ten_and_the_best(tmp_path):
    history = history_of()
    _, record = read_run(tmp_path, save(tmp_path, history=history))
    final = record["final"]
    assert final["last"]["up_bytes"] == history["up_bytes"].iloc[-1]
    assert final["mean_last_10"]["accuracy"] == pytest.approx(history["accuracy"].iloc[5:].mean(), rel=1e-15)
    assert final["best_accuracy"] == history["accuracy"].max()
    assert final["last"]["local_accuracy"] is None  # NaN is not JSON


@pytest.mark.parametrize("length", [1, 8, 61470 // 10 + 3])
def test_mask_comes_back_bit_for_bit_and_damage_is_named(tmp_path, length):
    mask = torch.rand(length, generator=torch.Generator().manual_seed(length)) < 0.1
    mask[0] = False
    layers = [{"name": "fc", "shape": [1, length], "kept": int(mask.sum())}]
    run_id = tiny_config().run_id
    save_run(tmp_path, tiny_config().resolved(), history_of(), {}, [], layers, mask)
    assert torch.equal(read_mask(tmp_path, run_id), mask)
    path = tmp_path / f"{run_id}.mask"
    data = path.read_bytes()
    for bad in (data[:-1], b"", bytes([data[0] ^ 1]) + data[1:]):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read_mask(tmp_path, run_id)
    path.unlink()
    with pytest.raises(ValueError, match=re.escape(str(path))):
        read_mask(tmp_path, run_id)


def test_a_dense_run_has_a_full_mask_without_a_file_and_an_old_record_none(tmp_path):
    layers = [{"name": "fc", "shape": [3, 5], "kept": 15}]
    save_run(tmp_path, tiny_config().resolved(), history_of(), {}, [], layers, torch.ones(15, dtype=torch.bool))
    assert read_mask(tmp_path, tiny_config().run_id).tolist() == [True] * 15
    assert not list(tmp_path.glob("*.mask"))
    assert read_mask(tmp_path, save(tmp_path, tiny_config(seed=9))) is None
    with pytest.raises(FileNotFoundError, match="no such run"):
        read_mask(tmp_path, "feddip_digits_0")


def test_a_run_records_its_last_mask_layer_by_layer(tmp_path):
    config = tiny_config()
    last = run(config, results_dir=tmp_path, progress=False).iloc[-1]
    mask, layers = read_mask(tmp_path, config.run_id), read_run(tmp_path, config.run_id)[1]["layers"]
    sizes = [math.prod(layer["shape"]) for layer in layers]
    assert [int(part.sum()) for part in mask.split(sizes)] == [layer["kept"] for layer in layers]
    assert 1 - sum(layer["kept"] for layer in layers) / sum(sizes) == pytest.approx(last["sparsity"], abs=1e-12)


def test_absent_run_is_none_and_an_absent_or_empty_folder_has_no_results(tmp_path):
    assert read_run(tmp_path, "feddip_digits_0") is None
    for folder in (tmp_path, tmp_path / "nowhere"):
        results = load_results(folder)
        assert results.empty
        assert set(COLUMNS) < set(results.columns)
        assert headline(results).empty


def test_csv_without_its_json_is_an_incomplete_run(tmp_path):
    run_id = save(tmp_path)
    (tmp_path / f"{run_id}.json").unlink()
    assert read_run(tmp_path, run_id) is None


def test_tampered_csv_is_refused_naming_the_file(tmp_path):
    run_id = save(tmp_path)
    path = tmp_path / f"{run_id}.csv"
    data = path.read_bytes()
    for bad in (data.replace(b"0.1", b"0.2", 1), data[:-1], data + b"\n", b"", data.replace(b"\n", b"\r\n")):
        path.write_bytes(bad)
        for read in (lambda: read_run(tmp_path, run_id), lambda: load_results(tmp_path)):
            with pytest.raises(ValueError, match=re.escape(f"{path}: does not match {run_id}.json")):
                read()


def test_damaged_or_missing_files_are_refused_naming_the_file(tmp_path):
    run_id = save(tmp_path)
    path = tmp_path / f"{run_id}.json"
    text = path.read_text()
    for bad in ("", text[: len(text) // 2], "[]", "{}", "\xff"):
        path.write_text(bad, encoding="latin-1")
        with pytest.raises(ValueError, match=re.escape(f"{path}: damaged result")):
            read_run(tmp_path, run_id)
    path.write_text(text)
    path.with_suffix(".csv").unlink()
    with pytest.raises(ValueError, match=re.escape(f"{run_id}.csv: does not match {run_id}.json")):
        read_run(tmp_path, run_id)


def test_renamed_result_is_refused(tmp_path):
    run_id = save(tmp_path)
    for kind in ("csv", "json"):
        (tmp_path / f"{run_id}.{kind}").rename(tmp_path / f"other.{kind}")
    with pytest.raises(ValueError, match="other.csv: does not match other.json"):
        load_results(tmp_path)


def test_load_results_joins_runs_with_their_configurations(tmp_path):
    configs = [
        tiny_config(seed=1),
        tiny_config(method="fedavg"),
        tiny_config(method="fedprox", lr_schedule="theory", smoothness=2.0, client_timeout=5.0),
        tiny_config(partition="pathological", method_options={"upload": "masked"}),
    ]
    for number, config in enumerate(configs):
        local = [0.5] * 15 if config.partition == "pathological" else [math.nan] * 15
        save(tmp_path, config, history_of(seed=number, local_accuracy=local))
    results = load_results(tmp_path)
    assert len(results) == 4 * 15
    for config in configs:
        rows = results[results["run_id"] == config.run_id]
        assert rows["round"].tolist() == list(range(15))
        assert set(rows["method"]) == {config.method}
        assert set(rows["initial_lr"]) == {0.1}
        assert rows["lr"].tolist() == (0.1 * 0.998 ** np.arange(15)).tolist()
        assert json.loads(rows["method_options"].iloc[0]) == config.resolved().method_options


def test_headline_is_the_mean_of_the_last_ten_evaluated_rounds_and_the_bytes_of_all(tmp_path):
    first, second = history_of(), history_of(rounds=4, seed=1)
    save(tmp_path, tiny_config(), first)
    save(tmp_path, tiny_config(seed=1), second)
    table = headline(load_results(tmp_path)).set_index("run_id")
    for config, history in ((tiny_config(), first), (tiny_config(seed=1), second)):
        row = table.loc[config.run_id]
        assert row["accuracy"] == pytest.approx(history["accuracy"].tail(10).mean(), rel=1e-15)
        assert row["sparsity"] == history["sparsity"].iloc[-1]
        assert (row["up_bytes"], row["down_bytes"]) == (history["up_bytes"].sum(), history["down_bytes"].sum())
        assert row["seed"] == config.seed


def test_headline_does_not_depend_on_the_order_of_rows(tmp_path):
    save(tmp_path)
    results = load_results(tmp_path)
    shuffled = results.sample(frac=1, random_state=0)
    assert headline(shuffled)["accuracy"].tolist() == headline(results)["accuracy"].tolist()


def test_interval_is_students_t_over_seeds():
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.302652729911275 * 1 / math.sqrt(3))  # t(0.975, 2) * s / sqrt(n)
    values = np.random.default_rng(0).random(7)
    low, high = stats.t.interval(0.95, 6, loc=values.mean(), scale=stats.sem(values))
    assert interval(values) == (pytest.approx((low + high) / 2), pytest.approx((high - low) / 2))


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.7]])
def test_fewer_than_three_values_have_no_interval(values):
    mean, half = interval(values)
    assert mean == pytest.approx(sum(values) / len(values))
    assert math.isnan(half)


def refuse(*arguments):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_failed_write_leaves_the_old_file_and_no_part(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    atomic_write(path, b"old")
    monkeypatch.setattr(os, step, refuse)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_write_replaces_the_file_and_makes_its_folder(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    for data in (b"old", b"newer", b""):
        atomic_write(path, data)
        assert path.read_bytes() == data
    assert [item.name for item in path.parent.iterdir()] == ["file"]


def test_run_on_a_full_disk_fails_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    config = tiny_config(**FAST)
    with monkeypatch.context() as context:
        context.setattr(os, "replace", refuse)
        with pytest.raises(OSError, match="No space left"):
            run(config, results_dir=tmp_path, progress=False)
    assert names(tmp_path) == []
    assert len(run(config, results_dir=tmp_path, progress=False)) == 3


def test_public_names():
    assert sorted(feddip_lite.__all__) == [
        "Config", "export_model", "load_model", "load_results", "own_dataset", "register_dataset", "register_model",
        "run",
    ]  # fmt: skip
    assert all(hasattr(feddip_lite, name) for name in feddip_lite.__all__)


def test_version_is_that_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert feddip_lite.__version__ == project["version"]


def test_import_loads_nothing_that_only_notebooks_downloads_or_figures_need():
    heavy = ["papermill", "nbconvert", "IPython", "torchvision", "matplotlib", "seaborn", "flwr", "sklearn"]
    code = f"import sys, feddip_lite; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


MEMORY = """
import resource, sys
from feddip_lite import Config, run
run(Config(dataset="fashionmnist", rounds=3, device="cpu"), progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif(not os.environ.get("FEDDIP_DATA"), reason="FEDDIP_DATA is not set")
def test_fifty_clients_of_lenet5_on_fashion_mnist_stay_below_one_and_a_half_gigabytes():
    done = subprocess.run([sys.executable, "-c", MEMORY], env=environment(), capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1.5e9


@pytest.mark.parametrize("line_ends", ["true", "input", "false"])
def test_records_are_whole_in_a_clone_that_changes_line_ends(tmp_path, line_ends):
    """As on Windows, where git turns the line ends of text files by default."""
    settings = ["-c", f"core.autocrlf={line_ends}", "-c", "core.eol=crlf"]
    source = tmp_path / "source"
    (source / "results").mkdir(parents=True)
    run(tiny_config(**FAST), results_dir=source / "results", progress=False)
    (source / ".gitattributes").write_bytes((ROOT / ".gitattributes").read_bytes())
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "records"]):
        subprocess.run(["git", *settings, *command], cwd=source, check=True, capture_output=True)
    command = ["git", *settings, "clone", "-q", str(source), str(tmp_path / "clone")]
    subprocess.run(command, check=True, capture_output=True)
    assert load_results(tmp_path / "clone" / "results").equals(load_results(source / "results"))


def test_what_git_can_restore_is_never_advised_to_be_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr("feddip_lite.records.store.ROOT", tmp_path)
    for folder, said in (("results/lite", "`git checkout -- "), ("build", "delete it to run again")):
        run_id = save(tmp_path / folder)
        (tmp_path / folder / f"{run_id}.json").write_text("{}")
        with pytest.raises(ValueError, match="damaged result") as caught:
            read_run(tmp_path / folder, run_id)
        assert said in str(caught.value)
        assert ("delete" in str(caught.value)) == (folder == "build")
