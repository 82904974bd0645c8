"""Laws of kill -9: wherever a run dies, it goes on to the bits of a run that nobody touched, a round lost at most."""

import json
import signal

import pytest
import torch
from conftest import TINY, csv_without_seconds, names, record_files, same_history, tiny_config
from victims import PLACES, child, digest, doomed_run, doomed_sweep

from feddip_lite import run
from feddip_lite.__main__ import main
from feddip_lite.train.checkpoint import load_checkpoint
from feddip_lite.train.observe import LastState

CPU = torch.device("cpu")
SHORT = {"clients": 4, "clients_per_round": 2, "batch_size": 128, "rounds": 5, "mask_interval": 2}
METHODS = {
    "FedDIP": SHORT,
    "FedDST, whose clients keep masks": {**SHORT, "method": "feddst", "preset": "repo"},
    "FedLP, whose clients keep heads": {
        **SHORT, "mask_interval": None, "method": "fedlp", "method_options": {"variant": "hetero"},
    },
}  # fmt: skip
"""Clients are drawn again and again, so that what they remember counts."""

FEW = [(name, place) for name in METHODS for place in PLACES if name == "FedDIP" or place[:5] in ("local", "check")]
SEEDS = range(1, 4)


@pytest.fixture(scope="module")
def undisturbed():
    """`undisturbed(config)`: history and digest of the run that nobody kills, computed once."""
    known = {}

    def of(config):
        if config.run_id not in known:
            torch.set_num_threads(1)
            known[config.run_id] = completed(config)
        return known[config.run_id]

    return of


def completed(config, **options):
    """History of `run`, and digest of its last state."""
    last = LastState()
    history = run(config, progress=False, observers=[last], **options)
    return history, digest(last.state) if last.state else None


def killed(process) -> bool:
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def check_kill(name, folder, place, seed, undisturbed):
    config = tiny_config(**METHODS[name])
    history, weights = undisturbed(config)
    folder.mkdir()
    died = killed(child(doomed_run, config, folder, place, seed))
    path = folder / f"{config.run_id}.checkpoint"
    done = len((folder / "rounds").read_text().splitlines()) if (folder / "rounds").exists() else 0
    assert died or place == "any moment"
    if died and not (folder / f"{config.run_id}.json").exists():
        saved = load_checkpoint(path, config, CPU).state.round if path.exists() else 0
        assert 0 <= done - saved <= 1
    again, same_weights = completed(config, results_dir=folder)
    assert same_history(again, history)
    assert same_weights in (weights, None)
    assert same_weights or place == "any moment"  # a run that was complete leaves nothing to compute
    assert set(names(folder)) - {"rounds"} == set(record_files(config.run_id))


@pytest.mark.parametrize(("name", "place"), FEW)
def test_killed_run_goes_on_to_the_same_bits_and_loses_one_round_at_most(tmp_path, undisturbed, name, place):
    check_kill(name, tmp_path / "results", place, 0, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", METHODS)
def test_many_killed_runs_go_on_to_the_same_bits(tmp_path, undisturbed, name, place, seed):
    check_kill(name, tmp_path / "results", place, seed, undisturbed)


# A sweep


SWEEP_KILLS = [
    ("write", ".checkpoint", 2),  # in the first run
    ("write", ".json", 2),  # at the end of the second
    ("renamed", ".json", 2),
    pytest.param("fsync", ".csv", 2, marks=pytest.mark.slow),
    pytest.param("rename", ".checkpoint", 7, marks=pytest.mark.slow),  # in the second
]


@pytest.mark.parametrize(("step", "suffix", "nth"), SWEEP_KILLS)
def test_killed_sweep_goes_on_and_leaves_complete_runs_alone(tmp_path, step, suffix, nth):
    profile = tmp_path / "two.yaml"
    defaults = {**TINY, **SHORT, "mask_interval": None}
    profile.write_text(json.dumps({"defaults": defaults, "queue": [{"method": ["fedavg", "feddip"]}]}))
    arguments = ["sweep", str(profile), "--quiet", "--checkpoint-every=1"]
    assert main([*arguments, f"--results={tmp_path / 'whole'}"]) == 0
    parts = tmp_path / "parts"
    assert killed(child(doomed_sweep, [*arguments, f"--results={parts}"], step, suffix, nth))
    complete = {path: path.stat().st_mtime_ns for path in parts.glob("*.json")}
    assert len(complete) == (0 if nth == 2 and suffix == ".checkpoint" else 1 + (step == "renamed"))
    assert main([*arguments, f"--results={parts}"]) == 0
    assert names(parts) == names(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in complete} == complete
    for path in parts.glob("*.csv"):
        assert csv_without_seconds(path) == csv_without_seconds(tmp_path / "whole" / path.name)
