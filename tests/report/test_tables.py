"""Laws of statistics and tables, on recorded runs of a tiny federation."""

from dataclasses import fields

import pandas as pd
import pytest
from conftest import FAST, tiny_config

from feddip_lite.methods import METHODS
from feddip_lite.methods.base import About
from feddip_lite.methods.fedavg import FedAvg
from feddip_lite.records.names import describe, labels
from feddip_lite.records.store import ROOT, headline, load_results
from feddip_lite.report.statistics import agreement, frontier, paired, quantity, ranking
from feddip_lite.report.tables import (
    assumptions,
    captioned,
    circumstances,
    methods_table,
    ranking_table,
    results_table,
    settings_table,
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
    assert quantity([]) == "-"


def twice(results, accuracy):
    """Seed 0's runs, and as seed 1 the same runs with another accuracy."""
    first = results[results["seed"] == 0]
    first = first.assign(accuracy=first.groupby("run_id").ngroup() / 10)
    other = first.assign(seed=1, run_id=first["run_id"] + "x", accuracy=accuracy(first["accuracy"]))
    return pd.concat([first, other])


def test_seeds_of_one_order_agree_and_of_opposite_order_disagree(results):
    same, opposite = ranking(twice(results, lambda value: value / 2)), ranking(twice(results, lambda value: 1 - value))
    names = [label for label in labels(twice(results, abs)) if "upload" not in label]
    assert agreement(same) == f"Kendall's tau: 1.00 (seeds 0 and 1: {', '.join(names)})."
    assert agreement(opposite) == f"Kendall's tau: -1.00 (seeds 0 and 1: {', '.join(names)})."
    table = ranking_table(same)
    places = [f"{place}" for place in range(1, len(names) + 1)]
    assert table["seed 0"].tolist() == table["seed 1"].tolist() == places and set(table["method"]) == set(names)
    assert "No two seeds" in agreement(ranking(only(results, "FedAvg", "FedDIP (repo)", seeds=(0,))))


def test_places_are_sorted_by_the_seeds_that_all_methods_have(results):
    both = only(results, "FedAvg", "FedDIP").assign(
        accuracy=lambda runs: runs["label"].map({"FedAvg": 0.8, "FedDIP": 0.9})
    )
    lucky = only(results, "FedAvg", seeds=(0,)).assign(seed=3, run_id="lucky", accuracy=99.0)
    table = ranking_table(ranking(pd.concat([both, lucky])))
    assert list(table) == ["method", "seed 0", "seed 1", "seed 2", "seed 3"]
    assert table.to_numpy().tolist() == [["FedDIP", "1", "1", "1", "-"], ["FedAvg", "2", "2", "2", "1"]]


def test_without_a_common_seed_there_is_no_frontier(results):
    apart = pd.concat([only(results, "FedAvg", seeds=(0,)), only(results, "FedDIP", seeds=(1,))])
    assert frontier(apart) == "No seed that all methods have."


def test_the_frontier_holds_whom_nobody_beats_in_both(results):
    runs = headline(results[results["seed"] == 0])
    said = frontier(results[results["run_id"].isin(runs["run_id"])])
    for _, own in runs.iterrows():
        beaten = ((runs["accuracy"] > own["accuracy"]) & (runs["mib"] < own["mib"])).any()
        ties = ((runs["accuracy"] >= own["accuracy"]) & (runs["mib"] <= own["mib"])).sum() > 1
        assert beaten or ties or f"{own['label']} ({own['accuracy']:.4f}, " in said
        assert not beaten or f"{own['label']} ({own['accuracy']:.4f}, " not in said


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


def test_a_notebook_shows_a_table_without_index_as_text_under_its_caption():
    page = captioned(pd.DataFrame({"cell": ["a < b"]}, index=[7]), "Tiny").to_html()
    assert "a &lt; b" in page and "<caption>Tiny</caption>" in page and ">7<" not in page
    assert "<caption>Tiny: none yet</caption>" in captioned(pd.DataFrame(), "Tiny").to_html()


def test_every_method_and_every_setting_has_a_row():
    table = methods_table()
    assert table["name"].tolist() == list(METHODS) and (table != "").all(axis=None)
    assert table.set_index("name").loc["fedavg", ["family", "presets"]].tolist() == ["dense to dense", "paper"]
    reconstructed = [title for title in table["method"] if title.endswith("†")]
    assert [line[2:].split(":")[0] for line in assumptions().splitlines()[2:]] == reconstructed
    settings = settings_table(ROOT / "params" / "methods.yaml")
    assert settings.notna().all(axis=None) and set(settings["method"]) <= set(table["method"])


def test_a_method_that_says_nothing_about_itself_stands_in_the_table_by_its_name(monkeypatch):
    silent = About(**dict.fromkeys([item.name for item in fields(About)], ""))
    mine = type("Mine", (FedAvg,), {"about": silent, "__module__": "builtins"})  # no source file either
    monkeypatch.setitem(METHODS, "mine", mine)
    row = methods_table().set_index("name").loc["mine"]
    assert row["method"] == "mine" and row["presets"] == "paper"
    assert (row.drop(["method", "presets", "regrows"]) == "-").all()
    assert "mine" not in assumptions()
