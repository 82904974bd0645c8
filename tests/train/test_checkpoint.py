"""Laws of interruption: a run resumes to the same bits, and a checkpoint is whole or refused by name."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import FAST, csv_without_seconds, interrupted, names, record_files, same_history, tiny_config

from feddip_lite import run
from feddip_lite.core.errors import ClientFailure
from feddip_lite.methods.base import Method
from feddip_lite.train.checkpoint import load_checkpoint, save_checkpoint

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "settings",
    [
        {"mask_interval": 2},
        {"preset": "memory", "eval_every": 3, "mask_interval": 1},
        {"method": "remembering", "clients": 3},  # so that clients are drawn again
        {"model": "resnet18", "width": 0.02},
    ],
    ids=["feddip", "server memory, rare evaluation", "client memory", "batchnorm"],
)
def test_interrupted_run_resumes_to_the_same_bits(tmp_path, remembering, settings):
    config = tiny_config(**{"rounds": 4, **FAST, **settings})
    whole = run(config, results_dir=tmp_path / "whole", progress=False)
    count, resumed = interrupted(config, tmp_path / "parts")
    assert count == 3
    assert same_history(whole, resumed)
    assert names(tmp_path / "parts") == names(tmp_path / "whole") == record_files(config.run_id)
    parts, one = (tmp_path / folder / f"{config.run_id}.csv" for folder in ("parts", "whole"))
    assert csv_without_seconds(parts) == csv_without_seconds(one)


def test_worker_count_may_change_when_resuming(tmp_path):
    config = tiny_config(**FAST)
    interrupted(config, tmp_path, stops=2)
    resumed = run(replace(config, workers=2), results_dir=tmp_path, progress=False)
    assert same_history(resumed, run(config, progress=False))


def test_checkpoint_every_round_loses_at_most_one_round_to_a_failure(tmp_path, monkeypatch, remembering):
    config = tiny_config(method=remembering, rounds=5, **FAST)
    whole = run(config, progress=False)

    def failing(self, offer, memory, t):
        if t == 3:
            raise RuntimeError("power cut")
        return plan(self, offer, memory, t)

    plan = Method.plan
    monkeypatch.setattr(Method, "plan", failing)  # not in the class itself: it would be another method
    with pytest.raises(ClientFailure, match="round 3, client .*power cut"):
        run(config, results_dir=tmp_path, checkpoint_every=1, progress=False)
    assert names(tmp_path) == [f"{config.run_id}.checkpoint"]
    assert load_checkpoint(tmp_path / f"{config.run_id}.checkpoint", config, CPU).state.round == 3
    monkeypatch.setattr(Method, "plan", plan)
    assert same_history(whole, run(config, results_dir=tmp_path, progress=False))


@pytest.fixture
def checkpoint(tmp_path, remembering):
    """(path, configuration) of a run stopped after its second round."""
    config = tiny_config(method=remembering, model="resnet18", width=0.02, **FAST)
    interrupted(config, tmp_path, stops=2)
    return tmp_path / f"{config.run_id}.checkpoint", config


def test_checkpoint_round_trip_is_exact(checkpoint, tmp_path):
    path, config = checkpoint
    progress = load_checkpoint(path, config, CPU)
    save_checkpoint(tmp_path / "copy", progress, config)
    copy = load_checkpoint(tmp_path / "copy", config, CPU)
    assert progress.state.round == copy.state.round == 2
    for name in ("weights", "buffers", "mask"):
        assert torch.equal(getattr(progress.state, name), getattr(copy.state, name))
    assert torch.equal(progress.state.memory["previous"], copy.state.memory["previous"])
    assert list(progress.state.memories) == list(copy.state.memories)
    memories = zip(progress.state.memories.values(), copy.state.memories.values(), strict=True)
    assert all(torch.equal(one["times"], other["times"]) for one, other in memories)
    assert repr(progress.rows) == repr(copy.rows)
    assert math.isnan(copy.rows[0]["pruning_error"])


def test_truncated_checkpoint_is_refused_by_name_and_reason(checkpoint):
    path, config = checkpoint
    data = path.read_bytes()
    for length in (0, 1, 10, 24, 25, 60, 90, 91, 500, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=rf"{path}: (damaged checkpoint|not a checkpoint of this version)"):
            run(config, results_dir=path.parent, progress=False)
    assert names(path.parent) == [path.name]  # it is left for its owner to judge


def test_checkpoint_with_one_flipped_bit_is_refused(checkpoint):
    path, config = checkpoint
    data = path.read_bytes()
    draw = torch.Generator().manual_seed(0)
    for place in [*range(0, 100, 13), *torch.randint(len(data), (20,), generator=draw).tolist()]:
        bad = bytearray(data)
        bad[place] ^= 1 << place % 8
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=rf"{path}: .*; delete it to start the run again"):
            load_checkpoint(path, config, CPU)


def test_checkpoint_of_another_configuration_is_refused(checkpoint):
    path, config = checkpoint
    with pytest.raises(ValueError, match=f"{path}: checkpoint of another configuration"):
        load_checkpoint(path, replace(config, lr=0.2), CPU)
    assert load_checkpoint(path, replace(config, workers=3, client_timeout=9.0), CPU).state.round == 2
