"""Laws of the two ways in which FedDIP's recorded runs begin (D7): no frame, figure or table holds both."""

import json
from dataclasses import asdict

import pandas as pd
import pytest

from feddip_lite.config import Config
from feddip_lite.records.catalogue import main_runs, profile_queue, recorded, shared_start
from feddip_lite.records.names import SHARED_START
from feddip_lite.records.store import COLUMNS, save_run, save_table
from feddip_lite.studies.bound.tables import recorded_paths
from feddip_lite.studies.sparsity_sweep import ablations, recorded_sweep

SHARED = {"erk": "shared"}
(FIRST, *_) = profile_queue("lite", model="lenet5", method="feddip", preset="paper", seed=0)


def save(folder, **changes):
    """A run of LeNet-5's main comparison with `changes`, recorded without any computing."""
    config = Config(**{**asdict(FIRST), **changes}).resolved()
    rows = pd.DataFrame({name: [0] for name in COLUMNS}).assign(accuracy=0.5, sparsity=config.target_sparsity)
    save_run(folder, config, rows, {}, [])


def starts(runs):
    """How the FedDIP and FedDP runs among these begin, by their own stored options."""
    own = runs[runs["method"].isin(["feddp", "feddip"])].drop_duplicates("run_id")
    return {json.loads(options).get("erk", "shared") for options in own["method_options"]}


def test_shared_start_has_plain_names_its_own_setting_and_nothing_that_begins_otherwise(tmp_path):
    save(tmp_path / "lite", method="fedavg")
    save(tmp_path / "lite", method="feddp", method_options=SHARED)
    save(tmp_path / "lite", method_options={**SHARED, "upload": "masked"})
    save(tmp_path / "lite", method="feddip")
    runs = shared_start(recorded("lite", tmp_path))
    assert runs["label"].tolist() == ["FedAvg", "FedDIP (upload = masked)", "FedDP"]
    assert runs["setting"].str.endswith(SHARED_START).all()
    assert shared_start(recorded("lite", tmp_path / "nowhere")).empty


@pytest.mark.parametrize("own", [False, True])
def test_main_runs_begin_alike_whatever_else_is_recorded(tmp_path, own):
    save(tmp_path / "lite", method="fedavg")
    save(tmp_path / "lite", preset="repo")  # does not stand for FedDIP's own start
    for method in ("feddp", "feddip"):
        save(tmp_path / "lite", method=method, method_options=SHARED)
        if own:
            save(tmp_path / "lite", method=method)
    (runs,) = main_runs("lite", tmp_path).values()
    named = {"FedAvg", "FedDP", "FedDIP"}
    assert set(runs["label"]) == (named | {"FedDIP (repo)"} if own else named)
    assert runs["setting"].str.endswith(SHARED_START).all() == (not own)


def test_a_comparison_of_one_method_is_none(tmp_path):
    save(tmp_path / "lite", method="fedavg")
    assert main_runs("lite", tmp_path) == {}


@pytest.mark.parametrize("own", [(), (0.9,), (0.9, 0.99), (0.9, 0.95, 0.99)])
def test_a_sweep_begins_alike(tmp_path, own):
    for target in (0.9, 0.95, 0.99):
        for method in ("feddp", "feddip"):
            save(tmp_path / "lite", method=method, target_sparsity=target, method_options=SHARED)
            if target in own:
                save(tmp_path / "lite", method=method, target_sparsity=target)
        save(tmp_path / "lite", method="snip", target_sparsity=target)  # swept, but no reason to leave FedDIP out
    swept = recorded_sweep(recorded("lite", tmp_path))
    assert {"FedDP", "FedDIP"} < set(swept["label"])
    assert swept["setting"].str.endswith(SHARED_START).all() == (len(own) < 3)


def test_the_shared_start_is_one_ablation_and_joins_no_other(tmp_path):
    for options in ({}, {"bn_statistics": "dense"}):
        save(tmp_path / "lite", method_options=options)
        save(tmp_path / "lite", method_options={**SHARED, **options})
    save(tmp_path / "lite", method="feddp")
    save(tmp_path / "lite", method="feddp", method_options=SHARED)
    save(tmp_path / "lite", preset="memory", method_options=SHARED)
    found = ablations(recorded("lite", tmp_path))
    names = ["FedDIP", "bn_statistics = dense", "erk = shared", "no penalty (FedDP)"]
    assert sorted(found["variant"]) == names


@pytest.mark.parametrize("own", [False, True])
def test_followed_paths_begin_alike(tmp_path, own):
    for options in [SHARED, {}] if own else [SHARED]:
        for interval in (1, 5):
            config = Config(**{**asdict(FIRST), "mask_interval": interval, "method_options": options}).resolved()
            save_table(
                tmp_path / "bound" / "lite", config, pd.DataFrame({"round": [0], "up_bytes": [0], "down_bytes": [0]})
            )
    paths = recorded_paths(tmp_path)
    assert set(paths["label"]) == {"FedDIP", "FedDIP (mask_interval = 1)"}
    assert len(paths) == 2
    assert paths["setting"].str.endswith(SHARED_START).all() == (not own)


def test_no_recorded_comparison_of_this_repository_mixes_the_two():
    for profile in ("lite", "long", "paper"):
        for runs in main_runs(profile).values():
            labelled = runs["setting"].str.endswith(SHARED_START)
            assert labelled.all() or not labelled.any()
            assert labelled.any() or starts(runs) <= {"per_client"}
