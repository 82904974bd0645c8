"""Laws of statistics and tables, on recorded runs of a tiny federation."""

from dataclasses import fields

import pandas as pd
import pytest
from conftest import FAST, tiny_config

from feddip_lite.methods import METHODS
from feddip_lite.methods.base import About
from feddip_lite.methods.fedavg import FedAvg
from feddip_lite.records.names import describe
from feddip_lite.records.store import headline, load_results
from feddip_lite.report.statistics import paired, quantity
from feddip_lite.report.tables import (
    assumptions,
    circumstances,
    markdown,
    methods_table,
    results_table,
)
from feddip_lite.train.run import train

TWO = {**FAST, "rounds": 2}
QUEUE = [tiny_config(method=method, seed=seed, **TWO) for method in ("fedavg", "feddip") for seed in (0, 1, 2)]
QUEUE += [tiny_config(preset="repo", **TWO), tiny_config(method_options={"upload": "masked"}, **TWO)]
QUEUE += [tiny_config(penalty_max=0.5, mask_interval=1, **TWO)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("results")
    train(QUEUE, path)
    return path


@pytest.fixture
def results(folder):
    return describe(load_results(folder))


def only(results, *names, seeds=(0, 1, 2)):
    return results[results["label"].isin(names) & results["seed"].isin(seeds)]


# ---- statistics


def test_differences_are_paired_by_seed(results):
    runs = headline(only(results, "FedAvg", "FedDIP"))
    by_hand = [
        runs.query("label == 'FedDIP' and seed == @seed")["accuracy"].item()
        - runs.query("label == 'FedAvg' and seed == @seed")["accuracy"].item()
        for seed in (0, 1, 2)
    ]
    assert paired(runs, "FedDIP", "FedAvg").tolist() == by_hand
    assert len(paired(runs[runs["seed"] != 1], "FedDIP", "FedAvg")) == 2
    assert len(paired(runs, "FedDP", "FedAvg")) == 0


def test_quantities_below_three_seeds_have_no_interval():
    assert quantity([0.5]) == "0.5000 (n=1)"
    assert quantity([0.5, 0.6]) == "0.5000, 0.6000 (n=2)"
    assert quantity([0.1, 0.2, 0.3], digits=2, sign="+") == "+0.20 ± 0.25 (n=3)"  # t(0.975, 2) = 4.303
    assert quantity([-0.001] * 3, digits=2, sign="+") == "+0.00 ± 0.00 (n=3)"
    assert quantity([]) == "-"


# ---- tables


def test_the_table_has_the_numbers_of_the_runs(results):
    table = results_table(results).set_index("method (preset)")
    run, whole, dense = only(results, "FedDIP", seeds=(0,)), *(headline(only(results, n)) for n in ("FedDIP", "FedAvg"))
    row = table.loc["FedDIP"]
    assert row["final accuracy"] == quantity(whole["accuracy"])
    assert float(row["measured sparsity"]) == pytest.approx(run["sparsity"].iloc[-1], abs=1e-3)
    assert float(row["total MiB"]) == pytest.approx(whole["mib"].mean(), abs=0.05)
    share = (whole["mib"].to_numpy() / dense["mib"].to_numpy()).mean()
    assert float(row["share of FedAvg's bytes"]) == pytest.approx(share, abs=5e-4)
    assert row["accuracy minus FedAvg's"].endswith("(n=3)") and "±" in row["accuracy minus FedAvg's"]
    assert table.loc["FedAvg", "accuracy minus FedAvg's"] == "-"


def test_circumstances_are_those_of_the_runs(folder, results):
    assert circumstances(folder, results).startswith("Seeds: 0, 1, 2. Data: Handwritten digits")


def test_every_method_has_a_row():
    table = methods_table()
    assert table["name"].tolist() == list(METHODS) and (table != "").all(axis=None)
    assert table.set_index("name").loc["fedavg", ["family", "presets"]].tolist() == ["dense to dense", "paper"]
    reconstructed = [title for title in table["method"] if title.endswith("†")]
    assert [line[2:].split(":")[0] for line in assumptions().splitlines()[2:]] == reconstructed


def test_a_method_that_says_nothing_about_itself_stands_in_the_table_by_its_name(monkeypatch):
    silent = About(**dict.fromkeys([item.name for item in fields(About)], ""))
    mine = type("Mine", (FedAvg,), {"about": silent, "__module__": "builtins"})  # no source file either
    monkeypatch.setitem(METHODS, "mine", mine)
    row = methods_table().set_index("name").loc["mine"]
    assert row["method"] == "mine" and row["presets"] == "paper"
    assert (row.drop(["method", "presets", "regrows"]) == "-").all()
    assert "mine" not in assumptions()


def test_a_frame_becomes_a_markdown_table_of_its_cells():
    frame = pd.DataFrame({"method": ["FedAvg", "FedDIP"], "pairs": [3, 10]})
    assert markdown(frame) == "| method | pairs |\n| --- | --- |\n| FedAvg | 3 |\n| FedDIP | 10 |"
