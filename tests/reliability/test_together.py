"""Laws of many processes: nothing torn, nothing computed twice, and a killed one holds nobody up."""

import os
import shutil
import signal
import subprocess
import time
from collections import Counter

import pytest
from conftest import names, record_files, same_history, tiny_config
from victims import child, crowd_member

from feddip_lite import load_results, run
from feddip_lite.records.store import ROOT, read_run

PROCESSES = 10
SHORT = {"clients": 4, "clients_per_round": 2, "batch_size": 128, "rounds": 5}
CONFIGS = [tiny_config(method=method, **SHORT) for method in ("fedavg", "feddip")]


def rounds_of(log):
    """[(pid, run id, round), ...] in the order in which the rounds ended."""
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return [(int(pid), run_id, int(t)) for pid, run_id, t in lines]


@pytest.fixture(scope="module")
def alone():
    return {config.run_id: run(config, progress=False) for config in CONFIGS}


@pytest.mark.parametrize("kill", [pytest.param(False, marks=pytest.mark.slow, id="all live"), True])
def test_ten_processes_on_one_folder_compute_every_run_once(tmp_path, alone, kill):
    log, folder = tmp_path / "log", tmp_path / "results"
    crowd = [child(crowd_member, CONFIGS, folder, log, seed) for seed in range(PROCESSES)]
    victim = None
    deadline = time.monotonic() + 100
    while kill and victim is None and time.monotonic() < deadline:
        if len(done := rounds_of(log)) >= 2:
            victim = done[-1][0]  # it holds the lock of the run that it is computing
            os.kill(victim, signal.SIGKILL)
        time.sleep(0.002)
    for process in crowd:
        process.join(100)
    assert sorted(process.exitcode for process in crowd) == [-signal.SIGKILL] * kill + [0] * (PROCESSES - kill)
    times = Counter((run_id, t) for _, run_id, t in rounds_of(log))
    assert set(times) == {(config.run_id, t) for config in CONFIGS for t in range(config.rounds)}
    assert sum(times.values()) - len(times) <= kill  # a killed process may lose its last round
    assert names(folder) == record_files(*alone)
    assert all(same_history(read_run(folder, run_id)[0], history) for run_id, history in alone.items())
    assert load_results(folder)["run_id"].nunique() == len(CONFIGS)


# make


def make_with(folder, python, *arguments):
    """`make` in a folder where `python`, a shell script, stands in for the environment's; and what that logged."""
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("pyproject.toml", "constraints.txt", ".venv/bin/python", ".venv/.ready"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(python)
    (folder / ".venv" / "bin" / "python").chmod(0o755)
    done = subprocess.run(["make", *arguments], cwd=folder, capture_output=True, timeout=60, check=False)
    return done.returncode, (folder / "log").read_text().splitlines()


def test_make_with_four_jobs_runs_one_target_after_the_other(tmp_path):
    python = '#!/bin/sh\necho "begin $*" >> log\nsleep 0.3\necho "end $*" >> log\n'
    status, lines = make_with(tmp_path, python, "-j4", "doctor", "sweep", "compare", "figures")
    assert status == 0
    words = [line.split(maxsplit=1) for line in lines]
    assert [word for word, _ in words] == ["begin", "end"] * 4
    assert all(begin == end for (_, begin), (_, end) in zip(words[::2], words[1::2], strict=True))


def test_make_reproduce_fails_where_the_notebooks_do(tmp_path):
    status, lines = make_with(tmp_path, '#!/bin/sh\necho "$*" >> log\nexit 1\n', "reproduce")
    assert status != 0
    assert lines == ["tools/reproduce.py --profile quick"]
