"""Laws of tools/compare.py: a fresh run is judged by the recorded seeds of its configuration, or not at all."""

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest

from feddip_lite.config import Config
from feddip_lite.records.store import sealed

SPEC = importlib.util.spec_from_file_location("compare", Path(__file__).parents[2] / "tools" / "compare.py")
TOOL = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(TOOL)


def record(folder, accuracies, first_seed=0, provenance=None, **config):
    folder.mkdir(exist_ok=True)
    for seed, accuracy in enumerate(accuracies, first_seed):
        run = {"method": "feddip", "rounds": 200, "device": "cpu", "seed": seed, **config}
        run_id = Config(**run).run_id
        final = {"last": {}, "mean_last_10": {"accuracy": accuracy}, "best_accuracy": 1.0}
        table = b"round,accuracy\n0,0.5\n"
        sha256 = hashlib.sha256(table).hexdigest()
        rest = {"final": final, "provenance": provenance or {}, "skipped": [], "csv_sha256": sha256}
        text = json.dumps({"run_id": run_id, "config": run, **rest}, indent=1).removesuffix("\n}").encode()
        (folder / f"{run_id}.csv").write_bytes(table)
        (folder / f"{run_id}.json").write_bytes(sealed(text))


def compare(folder):
    command = ["--recorded", str(folder / "recorded"), "--fresh", str(folder / "fresh")]
    return TOOL.main(command)


def test_the_interval_is_that_of_one_new_observation():
    low, high = TOOL.interval([0.80, 0.82, 0.84])  # t(0.975, 2) = 4.3027, s = 0.02, sqrt(4/3) = 1.1547
    assert (low, high) == pytest.approx((0.82 - 0.099366, 0.82 + 0.099366), abs=1e-6)


@pytest.mark.parametrize("accuracy, word, code", [(0.91, "inside", 0), (0.73, "inside", 0), (0.93, "OUTSIDE", 1)])
def test_a_run_is_judged_by_the_interval_of_three_seeds(tmp_path, capsys, accuracy, word, code):
    record(tmp_path / "recorded", [0.80, 0.82, 0.84])
    record(tmp_path / "fresh", [accuracy], device="cuda")  # the machine is no part of the experiment
    assert compare(tmp_path) == code
    assert word in capsys.readouterr().out


@pytest.mark.parametrize("accuracy", [float("nan"), None])  # None is what a record holds in place of NaN
def test_a_run_that_broke_down_is_outside(tmp_path, accuracy):
    record(tmp_path / "recorded", [0.80, 0.82, 0.84])
    record(tmp_path / "fresh", [accuracy])
    assert compare(tmp_path) == 1


def test_recorded_runs_that_diverged_are_no_values_and_a_fresh_one_of_that_seed_agrees(tmp_path, capsys):
    record(tmp_path / "recorded", [0.80, 0.82, 0.84, None])
    record(tmp_path / "fresh", [0.81, 0.81, 0.81, None])
    assert compare(tmp_path) == 0
    assert "diverged, as recorded" in capsys.readouterr().out


def test_options_that_are_younger_than_a_record_do_not_part_it_from_the_same_run(tmp_path):
    record(tmp_path / "recorded", [0.80, 0.82, 0.84], method_options={"upload": "dense"})
    record(tmp_path / "fresh", [0.81], method_options={"upload": "dense", "erk_over": "weights"})
    assert compare(tmp_path) == 0


def test_three_recorded_runs_equal_to_the_bit_accept_their_own_value(tmp_path):
    record(tmp_path / "recorded", [0.1] * 3)
    record(tmp_path / "fresh", [0.1])
    assert compare(tmp_path) == 0


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_recorded_seeds_give_no_verdict(tmp_path, capsys, seeds):
    record(tmp_path / "recorded", [0.80] * seeds)
    record(tmp_path / "fresh", [0.10])
    assert compare(tmp_path) == 0
    assert f"-0.7000 against the mean, no verdict, n = {seeds}" in capsys.readouterr().out


def test_runs_on_one_side_only_are_named_and_no_common_run_is_an_error(tmp_path, capsys):
    record(tmp_path / "recorded", [0.80], rounds=1000)
    record(tmp_path / "fresh", [0.80], rounds=10)
    assert compare(tmp_path) == 1
    said = capsys.readouterr().out
    assert "recorded only: feddip paper digits iid lenet5 1000 seed 0" in said
    assert "fresh only: feddip paper digits iid lenet5 10 seed 0" in said
    assert "nothing to compare" in said


def test_an_unreadable_run_is_named(tmp_path, capsys):
    record(tmp_path / "recorded", [0.80])
    record(tmp_path / "fresh", [])
    (tmp_path / "fresh" / "torn.json").write_text('{"run_id": ')
    assert compare(tmp_path) == 2
    assert "torn.json" in capsys.readouterr().err


def test_a_run_whose_table_was_changed_is_refused(tmp_path, capsys):
    record(tmp_path / "recorded", [0.80])
    record(tmp_path / "fresh", [0.80])
    table = next((tmp_path / "fresh").glob("*.csv"))
    table.write_bytes(table.read_bytes().replace(b"0.5", b"0.6"))
    assert compare(tmp_path) == 2
    assert table.name in capsys.readouterr().err


def test_a_record_of_something_else_than_a_run_is_named(tmp_path, capsys):
    record(tmp_path / "recorded", [0.8])
    record(tmp_path / "fresh", [0.8])
    (path,) = (tmp_path / "recorded").glob("*.json")
    other = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("final", "sha256")}
    path.write_bytes(sealed(json.dumps(other, indent=1).removesuffix("\n}").encode()))
    assert compare(tmp_path) == 2
    assert f"{path}: no record of `run` or `sweep`" in capsys.readouterr().err


def test_what_runs_came_from_is_compared_and_said_and_nothing_is_refused(tmp_path, capsys):
    packed, official = (
        {"data": {"variant": name, "sha256": name[0] * 64}, "torch": "2"} for name in ("packed", "official")
    )
    record(tmp_path / "recorded", [0.80, 0.82, 0.84], provenance=packed)
    record(tmp_path / "fresh", [0.81], provenance={**official, "own": {"model": "f" * 64}})
    assert compare(tmp_path) == 0
    out = capsys.readouterr().out
    assert f"other data: official {'o' * 12}; recorded packed {'p' * 12}" in out
    assert f"other model: {'f' * 12}; recorded none" in out and "other torch" not in out
