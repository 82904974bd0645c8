"""Laws of the sparsity sweep and the ablations: what is compared, paired by seed, and in which words."""

import json
import math
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest

from feddip_lite import Config
from feddip_lite.records.names import describe
from feddip_lite.report.statistics import paired
from feddip_lite.studies.sparsity_sweep import (
    ablation,
    ablations,
    gains,
    sparsity_sweep,
    sweep,
)

pytestmark = pytest.mark.usefixtures("agg")


def recorded_runs(runs):
    """Described runs of these (changes of the configuration, accuracy in every round)."""
    frames = []
    for changes, accuracy in runs:
        config = Config(**{"dataset": "fashionmnist", "rounds": 5, **changes}).resolved()
        facts = asdict(config) | {"initial_lr": config.lr, "method_options": json.dumps(config.method_options)}
        rows = {"round": range(config.rounds), "accuracy": accuracy, "loss": 1.0, "local_accuracy": math.nan}
        rows |= {"sparsity": config.target_sparsity, "up_bytes": 1, "down_bytes": 1, "diverged": ""}
        frames.append(pd.DataFrame(rows).assign(run_id=config.run_id, **{**facts, "lr": config.lr}))
    return describe(pd.concat(frames) if frames else pd.DataFrame(columns=["run_id", "round", "accuracy"]))


def sweep_of(*more, seeds=(0, 1, 2), targets=(0.8, 0.9, 0.99), gain=0.01):
    """Described runs of FedDP and FedDIP; FedDIP is `gain` times (target / 0.9) better under every seed."""
    runs = []
    for target in targets:
        for seed in seeds:
            base = 0.9 - target / 10 + 0.001 * seed
            runs.append(({"method": "feddp", "target_sparsity": target, "seed": seed}, base))
            runs.append(({"method": "feddip", "target_sparsity": target, "seed": seed}, base + gain * target / 0.9))
    return recorded_runs([*runs, *more])


def test_gain_is_the_difference_under_the_same_seed_at_each_sparsity():
    found = gains(sparsity_sweep(sweep_of()))
    assert list(found) == [0.8, 0.9, 0.99]
    for target, values in found.items():
        np.testing.assert_allclose(values, [0.01 * target / 0.9] * 3)


def test_seeds_that_only_one_method_has_are_not_compared():
    extra = ({"method": "feddip", "target_sparsity": 0.9, "seed": 7}, 0.1)
    assert len(gains(sparsity_sweep(sweep_of(extra)))[0.9]) == 3


@pytest.mark.parametrize(
    "other",
    [{"method": "snip", "target_sparsity": 0.9},
     {"method": "feddip", "penalty_max": 0.01}, {"method": "feddip", "preset": "memory"},
     {"method": "feddip", "weight_decay": 0.0}, {"method": "feddip", "rounds": 7},
     {"method": "feddip", "validation": 0.1}, {"method": "feddip", "lr_decay": 0.5},
     {"method": "feddip", "precision": "bf16"}, {"method": "feddip", "lr": 0.03}],
    ids=lambda other: ", ".join(f"{key}={value}" for key, value in other.items()),
)  # fmt: skip
def test_sweep_differs_in_sparsity_method_and_seed_alone(other):
    changed = sparsity_sweep(sweep_of(({"seed": 0, **other}, 0.5)))
    assert len(changed) == len(sparsity_sweep(sweep_of()))
    assert set(changed["accuracy"].round(6)) == set(sparsity_sweep(sweep_of())["accuracy"].round(6))


def test_a_method_joins_the_sweep_with_its_second_sparsity():
    snip = [({"method": "snip", "target_sparsity": target, "seed": 0}, 0.5) for target in (0.8, 0.9)]
    assert "SNIP" not in set(sparsity_sweep(sweep_of(snip[0]))["label"])
    assert "SNIP" in set(sparsity_sweep(sweep_of(*snip))["label"])


def test_a_dense_model_stands_at_every_sparsity_of_the_sweep():
    dense = [({"method": "fedavg", "target_sparsity": 0.9, "seed": seed}, 0.9) for seed in (0, 1)]
    found = sparsity_sweep(sweep_of(*dense))
    own = found[found["label"] == "FedAvg"]
    assert sorted(own["target_sparsity"]) == [0.8, 0.8, 0.9, 0.9, 0.99, 0.99] and np.allclose(own["accuracy"], 0.9)
    assert len(found) == len(sparsity_sweep(sweep_of())) + 6


def test_ablations_are_named_by_what_was_changed_and_paired_with_feddip():
    changes = [
        {"penalty_max": 0.01},
        {"mask_interval": 1},
        {"method_options": {"norm": "squared"}},
        {"preset": "memory"},
    ]
    changes += [{"weight_decay": 0.0}, {"method": "feddp"}, {"method": "feddp", "weight_decay": 0.0}]
    runs = [({"method": "feddip", "seed": seed}, 0.8 + 0.01 * seed) for seed in range(3)]
    for number, change in enumerate(changes, 1):
        runs += [
            ({"method": "feddip", "seed": seed, **change}, 0.8 + 0.01 * seed - 0.001 * number) for seed in range(3)
        ]
    runs.append(({"method": "feddip", "method_options": {"upload": "masked"}, "seed": 0}, 0.5))
    varied = ablations(recorded_runs(runs)).assign(label=lambda own: own["variant"])
    found = {name: paired(varied, name, "FedDIP").tolist() for name in varied["variant"].unique()}
    names = ["penalty_max = 0.01", "mask_interval = 1", "norm = squared", "memory", "weight decay 0"]
    names += ["no penalty (FedDP)", "no penalty (FedDP), weight decay 0"]
    assert found.pop("FedDIP") == [0.0] * 3
    assert found == {name: pytest.approx([-0.001 * number] * 3) for number, name in enumerate(names, 1)}


def test_figures_show_the_tables_numbers():
    runs = sparsity_sweep(sweep_of())
    left, right = sweep(runs, "title").axes
    means = runs.groupby(["label", "target_sparsity"])["accuracy"].mean()
    drawn = [line.get_ydata() for line in left.lines if line.get_marker() in ("o", "s")]
    np.testing.assert_allclose(drawn, [means["FedDP"], means["FedDIP"]])
    (won,) = (line.get_ydata() for line in right.lines if line.get_marker() == "s")
    np.testing.assert_allclose(won, [values.mean() for values in gains(runs).values()])
    assert [text.get_text() for text in left.get_xticklabels()] == ["80", "90", "99"]
    varied = ablations(sweep_of(targets=(0.9,)))
    (panel,) = ablation(varied, "title").axes
    (name,) = (text.get_text() for text in panel.get_yticklabels())
    assert name == "no penalty (FedDP) (n = 3)"
    (mean,) = (line.get_xdata() for line in panel.lines if line.get_marker() == "s")
    assert math.isclose(mean[0], -0.01)


def test_no_runs_give_empty_frames():
    assert sparsity_sweep(recorded_runs([])).empty and ablations(recorded_runs([])).empty
