"""Laws of runs that break down: recorded as what they are, shown, never averaged, and a queue goes on."""

import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
import yaml
from conftest import FAST, TINY, interrupted, names, read_outputs, tiny_config

from feddip_lite import run
from feddip_lite.__main__ import main
from feddip_lite.core.errors import ClientFailure, Diverged, is_divergence
from feddip_lite.methods import METHODS
from feddip_lite.methods.fedavg import FedAvg
from feddip_lite.records.catalogue import comparable, rows_choosing_masks
from feddip_lite.records.names import describe
from feddip_lite.records.profiles import load_profile
from feddip_lite.records.store import headline, load_results, read_run, run_lock
from feddip_lite.report.curves import accuracy_curves
from feddip_lite.report.statistics import interval, quantity
from feddip_lite.report.tables import results_table


@dataclass(frozen=True)
class Exploding(FedAvg):
    """FedAvg whose average is blown up at the end of round 1."""

    factor = 1e30

    def merge(self, state, replies, t):
        new = super().merge(state, replies, t)
        return replace(new, weights=new.weights * self.factor) if t == 1 else new


@pytest.mark.parametrize("factor", [1e30, float("inf"), float("nan")])
@pytest.mark.parametrize("eval_every", [1, 5])
def test_diverging_run_stops_at_once_naming_its_last_finite_loss(tmp_path, monkeypatch, factor, eval_every):
    monkeypatch.setitem(METHODS, "exploding", type("Exploding", (Exploding,), {"factor": factor}))
    config = tiny_config(method="exploding", rounds=9, eval_every=eval_every)
    known = run(replace(config, method="fedavg", rounds=2, eval_every=1), progress=False)["train_loss"].tolist()
    with pytest.raises((ValueError, ClientFailure)) as caught:
        run(config, results_dir=tmp_path, progress=False)
    if eval_every == 1:
        assert re.match(r"round 1: the global model's test loss is (nan|inf)", str(caught.value))
    else:
        assert re.match(r"round 2, client \d: Diverged: training diverged in step 1 of \d+", str(caught.value))
    assert str(caught.value).endswith(f"round 1 ended with the finite training loss {known[1]:.4g}")
    history, record = read_run(tmp_path, config.run_id)
    assert record["diverged"] == {"round": 1 if eval_every == 1 else 2, "reason": str(caught.value)}
    assert history["round"].tolist() == ([0] if eval_every == 1 else [])
    assert names(tmp_path) == [f"{config.run_id}.csv", f"{config.run_id}.json"]
    monkeypatch.setattr("feddip_lite.train.run.prepare", None)  # whoever computes, fails
    with pytest.raises(Diverged, match="diverged when it was recorded: round .*; delete .*, or run again"):
        run(config, results_dir=tmp_path, progress=False)


def test_diverging_run_that_was_resumed_still_knows_its_last_finite_loss(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "exploding", Exploding)
    config = tiny_config(method="exploding", rounds=9, eval_every=9)
    assert interrupted(config, tmp_path, stops=2) == (2, None)
    with pytest.raises(ClientFailure, match=r"round 2, client .* round 1 ended with the finite training loss \d\.\d+$"):
        run(config, results_dir=tmp_path, progress=False)


def test_a_queue_goes_on_after_a_diverging_run_and_past_one_that_another_process_holds(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(METHODS, "exploding", Exploding)
    entry = {**TINY, **FAST, "rounds": 3}
    queue = {"defaults": entry, "queue": [{"method": ["fedavg", "exploding", "feddip", "feddp"]}]}
    (tmp_path / "queue.yaml").write_text(yaml.safe_dump(queue))
    fedavg, exploding, feddip, feddp = load_profile(tmp_path / "queue.yaml")
    results = tmp_path / "results"
    arguments = ["sweep", str(tmp_path / "queue.yaml"), f"--results={results}", "--quiet"]
    with run_lock(results, feddip.run_id):
        assert main(arguments) == 1
    out, err = read_outputs(capsys)
    assert err == []
    assert [line.split(":")[1].strip().split()[0] for line in out[:4]] == [
        "accuracy",
        "diverged",
        "another",
        "accuracy",
    ]
    assert out[4] == "1 of 4 runs diverged"
    assert set(load_results(results)["run_id"]) == {fedavg.run_id, exploding.run_id, feddp.run_id}
    assert main(arguments) == 1  # a second call makes up for what was held, and says again what diverged
    assert "accuracy" in read_outputs(capsys)[0][2]


def test_a_diverged_run_is_shown_and_never_averaged(tmp_path, monkeypatch, agg):
    monkeypatch.setitem(METHODS, "exploding", Exploding)
    for seed in (0, 1, 2):
        run(tiny_config(method="fedavg", seed=seed, **FAST), results_dir=tmp_path, progress=False)
    first = describe(load_results(tmp_path))
    with pytest.raises((Diverged, ClientFailure)):
        run(tiny_config(method="exploding", seed=3, **FAST), results_dir=tmp_path, progress=False)
    results = describe(load_results(tmp_path))
    broken = results[results["diverged"] != ""]
    assert broken["round"].tolist() == [0, 1]
    assert broken["accuracy"].isna().tolist() == [False, True]
    assert headline(broken)[["accuracy", "sparsity", "mib", "up_bytes"]].isna().all(axis=None)
    renamed = results.assign(label="FedAvg", method="fedavg")  # as if it were a fourth seed
    values = headline(renamed)["accuracy"]
    assert interval(values) == interval(headline(first)["accuracy"])
    assert quantity(values) == quantity(headline(first)["accuracy"]).replace("(n=3)", "(n=3, 1 diverged)")
    assert quantity(values[headline(renamed)["seed"] == 3]) == "diverged (n=1)"
    assert comparable(renamed)["seed"].unique().tolist() == [0, 1, 2]
    assert "3, 1 diverged" in results_table(renamed)["final accuracy"].item()
    figure = accuracy_curves(renamed)
    mean, seed, *thin, cross = figure.axes[0].lines
    np.testing.assert_allclose(mean.get_ydata(), first.groupby("round")["accuracy"].mean())
    assert seed.get_xydata()[-1].tolist() == cross.get_xydata()[0].tolist() == [1, broken["accuracy"].iloc[0]]
    assert cross.get_marker() == "X" and len(thin) == 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["FedAvg (n = 3)", "FedAvg, diverged"]


def test_a_failure_of_another_kind_is_no_divergence_and_records_nothing(tmp_path, monkeypatch):
    class Failing(FedAvg):
        def plan(self, offer, memory, t):
            raise RuntimeError("no power")

    monkeypatch.setitem(METHODS, "failing", Failing)
    for policy in ("abort", "skip"):
        with pytest.raises(ClientFailure) as caught:
            run(tiny_config(method="failing", on_client_failure=policy, **FAST), results_dir=tmp_path, progress=False)
        assert not is_divergence(caught.value)
    assert names(tmp_path) == []


def test_where_every_run_diverged_nothing_is_compared(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "exploding", Exploding)
    with pytest.raises((Diverged, ClientFailure)):
        run(tiny_config(method="exploding", **FAST), results_dir=tmp_path, progress=False)
    results = describe(load_results(tmp_path))
    assert comparable(results).empty
    assert rows_choosing_masks(results).empty
    shown = results_table(results)[["final accuracy", "measured sparsity", "total MiB"]]
    assert shown.to_numpy().tolist() == [["diverged (n=1)", "-", "-"]]


def test_command_line_reports_divergence_as_a_failed_run_not_as_bad_input(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(METHODS, "exploding", Exploding)
    arguments = ["run", "--method=exploding", "--rounds=3", "--clients=60", "--width=0.3", "--device=cpu", "--quiet"]
    assert main([*arguments, f"--results={tmp_path}"]) == 1
    out, err = read_outputs(capsys)
    assert (out, len(err)) == ([], 1)
    assert "round 1: the global model's test loss" in err[0]
