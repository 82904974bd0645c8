"""Laws of followed runs: what a row holds, resuming, f in both settings; terms and words from a record; the figures."""

import importlib.util
import json
import math
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
from conftest import TINY, names, read_outputs, tiny_config

from feddip_lite.config import FIELDS
from feddip_lite.records.names import describe
from feddip_lite.records.profiles import load_profile
from feddip_lite.records.store import ROOT, load_results, read_run
from feddip_lite.studies.bound import path
from feddip_lite.studies.bound.estimators import Objective, assemble, estimate, pruning_distance
from feddip_lite.studies.bound.path import ESTIMATES, PATH_COLUMNS, record_path
from feddip_lite.studies.bound.tables import (
    bound_of,
    checkpoints,
    gamma_of,
)
from feddip_lite.train import run as rounds
from feddip_lite.train.evaluate import evaluate_state

COARSE = {"batches": 2, "curvature_samples": 30, "iterations": 2, "progress": False}
SHORT = {"clients": 12, "clients_per_round": 2, "rounds": 5, "eval_every": 2, "mask_interval": 2}
THEORY = {"lr_schedule": "theory", "smoothness": 40.0}


pytestmark = pytest.mark.usefixtures("agg")


# ---- following a run


def test_rows_are_the_states_of_the_run_and_estimates_are_those_of_their_state(tmp_path, federation, train):
    config = tiny_config(**SHORT)
    rows, (start, clients, _) = record_path(config, tmp_path, **COARSE), federation(config)
    done = train(config)
    states = [start, *(state for state, _ in done)]
    assert list(rows["round"]) == list(range(config.rounds + 1))
    for state, row in zip(states, rows.to_dict("records"), strict=True):
        removed = pruning_distance(state.weights[: len(state.mask)], state.mask)
        np.testing.assert_equal((row["pruning_error"], row["pruning_distance"]), removed)
    assert list(rows["sparsity"].iloc[1:]) == [record.sparsity for _, record in done]
    assert list(rows["down_bytes"]) == [0, *(record.down_bytes for _, record in done)]
    assert list(checkpoints(rows)["round"]) == [0, 2, 4, 5]
    for row in checkpoints(rows).to_dict("records"):
        state = states[row["round"]]
        expected = asdict(estimate(state, clients, config, **COARSE))  # NaN where nothing is pruned yet
        np.testing.assert_equal({name: row[name] for name in ESTIMATES}, expected)
        assert row["accuracy"] == evaluate_state(state, clients)["accuracy"]


def test_f_holds_penalty_and_weight_decay_in_the_theorems_setting_alone(tmp_path, federation):
    strong = {**SHORT, "rounds": 2, "penalty_max": 0.5, "penalty_steps": 2, "weight_decay": 0.1}
    for number, more in enumerate(({}, THEORY)):
        config = tiny_config(**strong, **more)
        last = record_path(config, tmp_path, **COARSE).iloc[1 + number]
        assert last["penalty"] == (0.0, 0.25, 0.5)[1 + number]
        record = json.loads((tmp_path / f"{config.run_id}.json").read_text())
        assert record["objective"] == ("cross-entropy", "cross-entropy + penalty + weight decay")[number]
    rows = [record_path(tiny_config(**strong, **more), tmp_path, **COARSE).iloc[0] for more in ({}, THEORY)]
    state, clients, _ = federation(tiny_config(**strong))
    point = state.weights.clone()
    point[: len(state.mask)] *= state.mask
    everyone = [index for shard in clients.train for index in shard.tolist()]

    def loss(model, **regulariser):
        indices = clients.train[0].new_tensor(everyone)
        return float(Objective(model, state.buffers, clients.data, **regulariser).loss_and_gradient(point, indices)[0])

    for row, regulariser in zip(rows, ({}, {"weight_decay": 0.1}), strict=True):  # the first round has no penalty
        expected = clients.workers.submit(partial(loss, **regulariser)).result()
        assert row["loss"] == pytest.approx(expected, rel=1e-6)
    assert rows[1]["loss"] > rows[0]["loss"]


def test_what_is_recorded_is_not_computed_again(tmp_path, monkeypatch):
    config = tiny_config(**SHORT)
    first = record_path(config, tmp_path, **COARSE)
    assert list(first) == list(PATH_COLUMNS)
    assert names(tmp_path) == [f"{config.run_id}.csv", f"{config.run_id}.json"]
    monkeypatch.setattr(rounds, "prepare", None)  # whoever computes, fails
    assert record_path(config, tmp_path, **COARSE).equals(first)


def test_an_interrupted_run_goes_on_from_its_last_estimates_to_the_same_bits(tmp_path, monkeypatch, remembering):
    config = tiny_config(**{**SHORT, "mask_interval": None, "method": remembering})  # with memory on both sides
    whole = record_path(config, tmp_path / "whole", **COARSE)
    done = []

    def failing(state, *arguments, **named):
        if state.round == 4 and 4 not in done:
            done.append(4)
            raise KeyboardInterrupt
        done.append(state.round)
        return estimate(state, *arguments, **named)

    monkeypatch.setattr(path, "estimate", failing)
    with pytest.raises(KeyboardInterrupt):
        record_path(config, tmp_path / "parts", **COARSE)
    assert names(tmp_path / "parts") == [f"{config.run_id}.checkpoint"]
    resumed = record_path(config, tmp_path / "parts", **COARSE)
    assert done == [0, 2, 4, 4, 5]
    assert resumed.drop(columns="seconds").equals(whole.drop(columns="seconds"))
    assert names(tmp_path / "parts") == names(tmp_path / "whole")


def test_no_column_has_the_name_of_a_setting_that_is_read_beside_it():
    assert set(PATH_COLUMNS) & FIELDS == {"lr"}  # which `load_results` calls initial_lr


def test_local_steps_are_the_most_that_a_client_makes(tmp_path, federation):
    config = tiny_config(**{**SHORT, "rounds": 1, "partition": "dirichlet", "alpha": 0.3, "local_epochs": 3})
    _, clients, _ = federation(config)
    largest = max(len(shard) for shard in clients.train)
    assert set(record_path(config, tmp_path, **COARSE)["local_steps"]) == {3 * math.ceil(largest / 32)}


def test_bad_data_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="clients: 1438"):
        record_path(tiny_config(clients=1438), tmp_path / "results", **COARSE)
    assert not (tmp_path / "results").exists()


# ---- the queues and the tool


@pytest.mark.parametrize("name", ["quick", "lite", "paper"])
def test_queues_of_this_repository_are_valid(name):
    assert len(load_profile(ROOT / "params" / "bound" / f"{name}.yaml")) > 1


def test_smoothness_in_the_queue_is_what_was_recorded():
    """The theorem's learning rate rests on an estimate: that of the same run with the experiments' learning rate."""
    found = load_results(ROOT / "results" / "bound" / "lite")
    for config in load_profile(ROOT / "params" / "bound" / "lite.yaml"):
        if config.lr_schedule == "theory":
            twin = replace(config, lr_schedule="exponential", smoothness=None)
            own = found[found["run_id"] == twin.run_id] if len(found) else found
            if len(own):
                largest = own[["sharpness", "secant"]].max(axis=None)
                assert config.smoothness == float(f"{largest:.2g}"), f"{config.run_id}: {largest}"


def tool():
    spec = importlib.util.spec_from_file_location("observe", ROOT / "tools" / "observe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tool_follows_its_queue_and_names_what_is_wrong(tmp_path, capsys, monkeypatch):
    for name in path.SAMPLING:
        monkeypatch.setitem(path.SAMPLING, name, COARSE[name])
    queue = tmp_path / "tiny.yaml"
    queue.write_text(f"defaults: {json.dumps({**TINY, **SHORT, 'rounds': 2})}\nqueue:\n  - {{seed: [0, 1]}}\n")
    arguments = [str(queue), f"--results={tmp_path / 'results'}", "--quiet"]
    assert tool().main([*arguments, "--workers=1"]) == 0
    out, err = read_outputs(capsys)
    assert [line.split()[1].rstrip(":") for line in out] == [config.run_id for config in load_profile(queue)]
    assert (err, len(load_results(tmp_path / "results"))) == ([], 6)
    _, record = read_run(tmp_path / "results", load_profile(queue)[0].run_id)
    assert record["estimates"] == {name: COARSE[name] for name in path.SAMPLING}
    assert tool().main([str(tmp_path / "none.yaml")]) == 2
    assert tool().main([*arguments, "--workers=-1"]) == 2
    out, err = read_outputs(capsys)
    assert out == [] and "none.yaml" in err[0] and "workers: -1" in err[1] and len(err) == 2


# ---- terms and words, on a record by hand


def record(gamma=(3.0, 2.0, math.inf), distance=(9.0, 1.0, 2.0, 4.0, 8.0), **changes) -> pd.DataFrame:
    """T = 4, checkpoints at 0, 2, 4: L = 5 (at the second), mu = 2, f from 2 to 0.5."""
    at = {"loss": (2.0, 0.5, 1.0), "gradient_square": (6.0, 2.0, 1.0), "sharpness": (4.0, 3.0, 1.0)}
    at |= {"secant": (1.0, 5.0, math.nan), "lipschitz": (2.0, 1.0, 1.0), "pruning_lipschitz": (0.5, 1.0, 2.0)}
    at |= {"variance": (0.6, 0.5, 0.1), "second_moment": (9.0, 8.0, 7.0), "second_moment_99": (8.0, 7.0, 6.0)}
    at |= {"dispersion": gamma, "raw_dispersion": (3.0, 2.0, 2.0), "accuracy": (0.1, 0.5, 0.9)}
    rows = pd.DataFrame({"round": range(5), "pruning_distance": distance, "sparsity": [0.5, 0.6, 0.7, 0.8, 0.9]})
    for name, values in at.items():
        rows[name] = [values[0], math.nan, values[1], math.nan, values[2]]
    config = asdict(tiny_config(**{**SHORT, "rounds": 4, **changes}).resolved())
    config["initial_lr"], config["method_options"] = config.pop("lr"), json.dumps(config["method_options"])
    facts = {"pruning_error": 0.1, "local_steps": 10, "up_bytes": 0, "down_bytes": 0, "lr": config["initial_lr"]}
    rows = rows.assign(**facts, **config)
    return describe(rows.assign(run_id=tiny_config(**{**SHORT, "rounds": 4, **changes}).run_id))


def test_gamma_is_the_largest_or_the_median_of_the_finite_estimates_and_never_below_one():
    assert (gamma_of(record(), False), gamma_of(record(), True)) == (3.0, 2.5)
    assert gamma_of(record(gamma=(0.9, 0.8, 0.7)), True) == 1.0


@pytest.mark.parametrize("printed", [False, True])
@pytest.mark.parametrize("typical", [False, True])
def test_the_bound_of_a_record_is_that_of_its_estimates_without_the_first_pruning(printed, typical):
    run = record()
    rows = [path.Estimates(**row) for row in run.iloc[[0, 2, 4]][list(ESTIMATES)].to_dict("records")]
    gamma = 2.5 if typical else 3.0
    expected = assemble(rows, [1.0, 2.0, 4.0, 8.0], participants=2, steps=10, gamma=gamma, printed=printed)
    assert bound_of(run, typical=typical, printed=printed) == expected


def test_the_theorems_smoothness_is_that_of_its_learning_rate():
    run, slower = record(), record(**THEORY)  # 1/(40 t), where L = 5 was found
    for name, factor in {"initial": 8, "pruning": 8, "noise": 1, "drift": 1, "left": 1}.items():
        assert getattr(bound_of(slower), name) == pytest.approx(factor * getattr(bound_of(run), name))
