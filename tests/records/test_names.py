"""Laws of what runs are called: also a run whose method this version does not know has a name."""

from dataclasses import dataclass

import pytest
from conftest import FAST, tiny_config

from feddip_lite import run
from feddip_lite.core.settings import real, setting
from feddip_lite.methods import METHODS
from feddip_lite.methods.fedavg import FedAvg
from feddip_lite.records.names import describe, labels
from feddip_lite.records.store import headline, load_results
from feddip_lite.report.statistics import paired
from feddip_lite.report.tables import results_table


@dataclass(frozen=True)
class Lent(FedAvg):
    """FedAvg with a setting of its own, which it does not use."""

    target_sparsity: float = 0.9
    strength: float = setting(0.5, real("[0, 1]"), "of nothing")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Runs of FedAvg, FedDIP and a method that is not registered any more."""
    with monkeypatch.context() as patched:
        patched.setitem(METHODS, "lent", Lent)
        for method in ("fedavg", "feddip", "lent"):
            options = {"strength": 0.25} if method == "lent" else {}
            config = tiny_config(method=method, method_options=options, **{**FAST, "rounds": 2})
            run(config, results_dir=tmp_path, progress=False)
    return tmp_path


def test_a_run_of_an_unregistered_method_is_shown_by_its_name_and_changes_no_other(folder):
    results = describe(load_results(folder))
    assert labels(results) == ["FedAvg", "FedDIP", "lent"]
    own = results[results["method"] == "lent"]
    assert (own[["label", "changed", "split"]] == ["lent", "", "IID"]).all(axis=None)
    assert results["setting"].nunique() == 1
    assert paired(headline(results), "lent", "FedAvg").tolist() == [0.0]
    assert results_table(results)["method (preset)"].tolist() == ["FedAvg", "FedDIP", "lent"]


def test_how_values_travel_is_in_the_name_and_makes_an_own_setting_of_no_run(tmp_path):
    few = {**FAST, "rounds": 2}
    codecs = ({}, {"up": "qsgd"}, {"up": "topk", "up_feedback": "ef"})
    for changes in codecs:
        run(tiny_config(method="fedavg", **few, **changes), results_dir=tmp_path, progress=False)
    results = describe(load_results(tmp_path))
    said = ["FedAvg", "FedAvg (up = qsgd:8:512)", "FedAvg (up = topk:0.01, up_feedback = ef)"]
    assert labels(results) == said and results["setting"].nunique() == 1
    assert set(results["changed"]) == {"", "up", "up, up_feedback"}


def test_its_name_says_its_preset(folder):
    results = load_results(folder)
    own = results[results["method"] == "lent"].assign(preset="mine")
    assert labels(describe(own)) == ["lent (mine)"]
