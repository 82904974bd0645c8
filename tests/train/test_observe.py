"""Laws of observers: when they are told of what, that they change nothing, and that what they keep is not lost."""

import json
import shutil
import subprocess
import sys
import time

import pandas as pd
import pytest
from conftest import FAST, TINY, environment, interrupted, names, record_files, same_history, tiny_config

from feddip_lite import run
from feddip_lite.core.errors import ClientFailure, OutOfTime
from feddip_lite.methods import METHODS
from feddip_lite.methods.fedavg import FedAvg
from feddip_lite.records.store import ROOT
from feddip_lite.train.observe import LastState, Observer
from feddip_lite.train.recording import Recording
from feddip_lite.train.round import run_round
from feddip_lite.train.run import execute


class Diary(Observer):
    """Notes what it is told, also where a checkpoint keeps it."""

    name = "diary"

    def __init__(self):
        self.told = []

    def started(self, run):
        self.told.append(("started", run.state.round))
        run.progress.observed.setdefault(self.name, [])

    def round_done(self, run, record):
        self.told.append(("round", record.round, len(run.progress.rows)))
        run.progress.observed[self.name].append({"round": record.round, "sparsity": record.sparsity})

    def ended(self, run, error):
        self.told.append(("ended", run.state.round, type(error).__name__))
        self.kept = run.progress.observed[self.name]


def test_observers_are_told_of_start_every_round_and_end():
    diary = Diary()
    run(tiny_config(rounds=4, eval_every=3), progress=False, observers=[diary])
    rounds = [("round", 0, 0), ("round", 1, 0), ("round", 2, 1), ("round", 3, 2)]
    assert diary.told == [("started", 0), *rounds, ("ended", 4, "NoneType")]


def test_observers_change_nothing():
    config = tiny_config(**FAST)
    assert same_history(run(config, progress=False), run(config, progress=False, observers=[Diary(), LastState()]))


def test_the_last_state_is_that_of_as_many_rounds(federation):
    config, last = tiny_config(**FAST).resolved(), LastState()
    run(config, progress=False, observers=[last])
    state, clients, method = federation(config)
    for _ in range(config.rounds):
        state, _ = run_round(state, clients, method, config)
    assert state.weights.equal(last.state.weights) and state.mask.equal(last.state.mask)


def test_what_an_observer_keeps_outlives_interruptions(tmp_path):
    config, whole = tiny_config(rounds=4), Diary()
    run(config, progress=False, observers=[whole])
    diary = Diary()
    for _ in range(config.rounds - 1):
        with pytest.raises(OutOfTime):
            execute(config, Recording(tmp_path), [diary], deadline=0)
    execute(config, Recording(tmp_path), [diary])
    assert diary.kept == whole.kept and len(diary.kept) == 4
    assert diary.told.count(("started", 2)) == 1
    assert interrupted(config, tmp_path)[0] == 0  # the run is there


def test_an_observer_hears_how_a_run_fails(monkeypatch):
    class Failing(FedAvg):
        def plan(self, offer, memory, t):
            raise RuntimeError("no")

    monkeypatch.setitem(METHODS, "failing", Failing)
    diary = Diary()
    with pytest.raises(ClientFailure):
        run(tiny_config(method="failing"), progress=False, observers=[diary])
    assert diary.told == [("started", 0), ("ended", 0, "ClientFailure")]


def test_without_the_folder_fast_everything_works(tmp_path):
    shutil.copytree(
        ROOT / "feddip_lite", tmp_path / "feddip_lite", ignore=shutil.ignore_patterns("fast", "__pycache__")
    )
    settings = json.dumps({**TINY, "rounds": 2})
    # Without the second line an editable install would find the folder, where the package was installed from.
    code = "import json, sys\n"
    code += "sys.modules['feddip_lite.fast'] = None\n"
    code += "import feddip_lite as f\n"
    code += f"print(f.run(f.Config(**json.loads('{settings}')), progress=False).to_csv())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(PYTHONPATH=str(tmp_path)), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    usual = run(tiny_config(rounds=2), progress=False)
    slower = [float(line.split(",")[2]) for line in done.stdout.split()[1:]]
    assert slower == pytest.approx(usual["accuracy"].tolist(), abs=0.02)


def test_rows_are_in_a_file_as_they_come_and_the_file_goes_with_the_end(tmp_path):
    config = tiny_config(rounds=4, **FAST)
    path, seen = tmp_path / f"{config.run_id}.partial.csv", []

    class Look(Observer):
        def round_done(self, run, record):
            seen.append(pd.read_csv(path) if path.exists() else None)

    def look():
        return execute(config, Recording(tmp_path), [Look()], deadline=time.monotonic())

    with pytest.raises(OutOfTime):
        look()
    assert seen == [None]  # observers are told in turn
    assert len(pd.read_csv(path)) == 1
    with pytest.raises(OutOfTime):
        look()
    whole = run(config, results_dir=tmp_path, progress=False, observers=[Look()])
    assert [None if rows is None else len(rows) for rows in seen] == [None, 1, 2, 3]
    assert same_history(seen[-1].assign(local_accuracy=float("nan")), whole.iloc[:3])
    assert names(tmp_path) == record_files(config.run_id) and not path.exists()
