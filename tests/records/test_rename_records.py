"""Laws of recorded runs' identity: every record's id follows from its configuration, and a changed default renames."""

import importlib.util
import json
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import names, read_outputs, tiny_config

from feddip_lite.config import Config
from feddip_lite.methods.feddip import FedDP
from feddip_lite.records.store import ROOT, read_mask, read_record, read_run, sealed
from feddip_lite.train.run import run

_spec = importlib.util.spec_from_file_location("rename_records", ROOT / "tools" / "rename_records.py")
rename_records = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(rename_records)


def test_the_id_of_every_record_follows_from_its_configuration():
    records = sorted((ROOT / "results").rglob("*.json"))
    assert len(records) > 100
    for path in records:
        record = read_record(path)
        assert record["run_id"] == path.stem == Config.from_dict(record["config"]).run_id
        assert rename_records.explicit(record["config"]) == record["config"]  # no setting is left to a later default


@pytest.fixture
def before(tmp_path, monkeypatch):
    """A run recorded when another mask source was the default, under the id that it had then."""
    presets = {**FedDP.presets, "paper": {"mask_source": "masked_average"}}
    with monkeypatch.context() as then:
        then.setattr(FedDP, "presets", presets)
        config = tiny_config(method="feddp", rounds=1)
        run(config, results_dir=tmp_path, progress=False)
    return config.run_id


def test_a_record_from_before_a_changed_default_is_never_taken_for_the_new_run(tmp_path, before):
    assert before == tiny_config(method="feddp", rounds=1).run_id  # the trap
    with pytest.raises(ValueError, match=r"a record of another run.*rename_records\.py"):
        read_run(tmp_path, before)
    with pytest.raises(ValueError, match=r"a record of another run.*rename_records\.py"):
        run(tiny_config(method="feddp", rounds=1), results_dir=tmp_path, progress=False)


def test_renaming_moves_a_record_whole_and_a_second_call_changes_nothing(tmp_path, before, capsys):
    old = read_record(tmp_path / f"{before}.json")
    table, files = (tmp_path / f"{before}.csv").read_bytes(), len(names(tmp_path))
    assert rename_records.main([str(tmp_path)]) == 0
    right = tiny_config(method="feddp", rounds=1, method_options={"mask_source": "masked_average"}).run_id
    assert read_outputs(capsys)[0] == [f"{before}.json -> {right}"]
    assert len(names(tmp_path)) == files
    assert all(name.startswith(right) for name in names(tmp_path))
    history, record = read_run(tmp_path, right)
    assert (tmp_path / f"{right}.csv").read_bytes() == table
    assert {**record, "run_id": before} == old
    assert isinstance(history, pd.DataFrame)
    assert isinstance(read_mask(tmp_path, right), torch.Tensor)
    assert rename_records.main([str(tmp_path)]) == 0
    assert read_outputs(capsys) == ([], [])


def test_a_call_that_was_cut_off_is_finished_by_the_next(tmp_path, before, capsys):
    kept = {path.name: path.read_bytes() for path in tmp_path.glob("feddp_*")}
    assert rename_records.main([str(tmp_path)]) == 0
    there = names(tmp_path)
    for name, data in kept.items():  # as if it had stopped before the first unlink
        (tmp_path / name).write_bytes(data)
    assert rename_records.main([str(tmp_path)]) == 0
    assert names(tmp_path) == there
    capsys.readouterr()


def test_an_id_that_is_held_by_a_record_which_moves_itself_is_no_conflict(tmp_path, monkeypatch, capsys):
    """Two defaults change places: each record's right id is the one that the other has."""
    swapped = {"paper": {"mask_source": "masked_average"}, "repo": {"mask_source": "dense_average"}, "memory": {}}

    def right(config):
        return replace(config, method_options={"mask_source": "masked_average"}).run_id

    choices = [tiny_config(method="feddp", rounds=1, mask_interval=interval) for interval in range(1, 9)]
    blocked_first = next(config for config in choices if config.run_id < right(config))  # met before what blocks it
    configs = [blocked_first, next(config for config in choices if config != blocked_first)]
    with monkeypatch.context() as then:
        then.setattr(FedDP, "presets", swapped)
        for config in configs:
            run(config, results_dir=tmp_path, progress=False)
    rights = [right(config) for config in configs]
    _, second = (tmp_path / f"{config.run_id}.json" for config in configs)
    blocked = tmp_path / f"{rights[0]}.json"  # the second record, under the id that the first is to have
    for suffix in (".json", ".csv", ".mask", ".safetensors"):
        second.with_suffix(suffix).rename(blocked.with_suffix(suffix))
    record = {**json.loads(blocked.read_text()), "run_id": rights[0]}
    del record["sha256"]
    blocked.write_bytes(sealed(json.dumps(record, indent=1).removesuffix("\n}").encode()))
    assert rename_records.main([str(tmp_path)]) == 0
    assert {path.stem for path in tmp_path.glob("*.json")} == set(rights)
    capsys.readouterr()


def test_a_record_with_a_setting_that_is_gone_is_refused_by_name(tmp_path, before, capsys):
    path = tmp_path / f"{before}.json"
    record = json.loads(path.read_text())
    del record["sha256"]
    record["config"]["method_options"]["mask_share"] = 0.2
    path.write_bytes(sealed(json.dumps(record, indent=1).removesuffix("\n}").encode()))
    with pytest.raises(ValueError, match=rf"{path}: a record of another version .*mask_share.*; delete it"):
        read_run(tmp_path, before)
    assert rename_records.main([str(tmp_path)]) == 2
    assert "a record of another version" in read_outputs(capsys)[1][0]


def test_an_id_that_is_taken_and_a_damaged_record_are_refused_and_nothing_is_lost(tmp_path, before, capsys):
    right = tiny_config(method="feddp", rounds=1, method_options={"mask_source": "masked_average"})
    run(replace(right), results_dir=tmp_path, progress=False)
    there = names(tmp_path)
    assert rename_records.main([str(tmp_path)]) == 2
    assert "which is taken" in read_outputs(capsys)[1][0]
    assert names(tmp_path) == there
    path = tmp_path / f"{right.run_id}.json"
    path.write_text(json.dumps({"run_id": right.run_id}))
    assert rename_records.main([str(tmp_path)]) == 2
    assert "damaged result" in read_outputs(capsys)[1][0]
