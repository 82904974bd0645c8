"""Laws of the cost report: shares and formulas by hand, sentences that follow from the rows, figures that show them."""

import json

import pandas as pd
import pytest
from conftest import FAST, tiny_config

from feddip_lite.core.flat import Layout
from feddip_lite.core.schedules import sparsity_at
from feddip_lite.records.store import ROOT
from feddip_lite.report.style import save_figure
from feddip_lite.studies.cost import figures as cost_figures
from feddip_lite.studies.cost.measure import CSR, DENSE, untrained
from feddip_lite.studies.cost.tables import (
    circumstances,
    crossings,
    judged_clients,
    models_table,
    published_bytes,
    read_cost,
    reading,
)
from feddip_lite.train.run import train

TWO = {**FAST, "rounds": 2}


pytestmark = pytest.mark.usefixtures("agg")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """FedAvg, FedDIP and FedDIP with masked uploads, described."""
    queue = [tiny_config(method="fedavg", **TWO), tiny_config(**TWO)]
    queue += [tiny_config(method_options={"upload": "masked"}, **TWO)]
    return train(queue, tmp_path_factory.mktemp("results"))


def cells(table, label, column=0):
    """The cells of the row that has this label in that column."""
    (row,) = table[table.iloc[:, column] == label].to_numpy().tolist()
    return row


def test_the_published_formula_is_dense_up_and_at_the_target_down_and_only_where_it_applies(runs):
    size = Layout.of(untrained("digits", "lenet5", 0.3)).size
    by_label = {label: published_bytes(own) for label, own in runs.groupby("label")}
    assert (by_label["FedAvg"] == 2 * 4 * size).all(axis=None)
    assert (by_label["FedDIP"]["up_bytes"] == 2 * 4 * size).all()
    down = [2 * 4 * size * (1 - sparsity_at(t, 0.5, 0.9, 2)) for t in (0, 1)]
    assert by_label["FedDIP"]["down_bytes"].tolist() == down


def test_the_published_formula_gives_the_published_number():
    run = {"dataset": "fashionmnist", "model": "lenet5", "width": 1.0, "clients_per_round": 5, "rounds": 1}
    (cost,) = published_bytes(pd.DataFrame([{**run, "initial_sparsity": None}])).to_numpy()
    assert cost.tolist() == [5 * 4 * 61706] * 2
    assert cost.sum() * 8 / 2**20 == pytest.approx(18.83, abs=0.01)  # 9.42 in the published unit each way when dense


def clients(ratio=2.0, model="LeNet-5", turns=3):
    parts = dict.fromkeys(("weights", "gradient", "mask", "buffers", "activations", "total"), 2**20)
    return pd.DataFrame(
        {"split": model, "label": label, "seed": turn, "seconds": times * (1 + turn), "peak_mib": 40.0, **parts}
        for label, times in (("FedAvg", 1.0), ("FedDIP", ratio))
        for turn in range(turns)
    )


def times(fast=0.9, model="LeNet-5", batch=1):
    """Dense takes 1 ms; CSR 2 ms, and half a millisecond from the sparsity `fast` on."""
    values = [
        (s, form, 1.0 if form == DENSE else 0.5 if s >= fast else 2.0) for s in (0.5, 0.9) for form in (DENSE, CSR)
    ]
    return pd.DataFrame(
        {"model": model, "batch": batch, "sparsity": s, "form": form, "lower": t, "median": t, "upper": t * 1.1}
        for s, form, t in values
    )


def models():
    row = {"weights": 1000, "prunable": 900, "kept": 90, "file": 1024, "dense_file": 4096, "message": 512}
    row |= {"dense_message": 4096, "flops": 1, "dense_flops": 4, "left": float("nan"), "target": 0.9}
    row |= {"training_dense": 10, "training_feedback": 6, "training_masked": 3, "sparsity": 0.9}
    return pd.DataFrame([{"model": "LeNet-5", **row}, {"model": "LeNet-5", **row, "target": 0.5, "sparsity": 0.5}])


def record(rehearsal=False, load=0.1):
    facts = {"device": "cpu", "cpus": 2, "torch": "2", "load": {"before": load, "after": 0.0}, "rehearsal": rehearsal}
    frames = {"clients": clients(), "layers": times().assign(layer="4 to 3"), "models": models(), "times": times()}
    return {"settings": {"repeats": 9, "client_turns": 3}, "provenance": facts, **frames}


def test_shares_of_sizes_are_of_the_dense_model_and_unknown_ones_are_left_out():
    row = cells(models_table(models()), "0.900", column=1)
    assert row == ["LeNet-5", "0.900", "1.0 (0.250)", "0.5 (0.125)", "0.250", "0.600", "0.300", "-"]


def test_a_sentence_says_where_sparsity_buys_no_time_and_only_there():
    gains, none = times(), times(fast=1.0, model="ResNet-18", batch=128)
    assert "LeNet-5**, the whole model, 1 image at a time: faster from sparsity 0.9 on; at 0.9 CSR" in crossings(gains)
    assert "takes 0.50 of the dense time" in crossings(gains)
    text = reading(clients(), pd.concat([gains, none]))
    assert "buys no time on this machine for ResNet-18 with 128 images at a time." in text
    assert "FedDIP takes 2.000 ± 0.000 (n=3) times FedAvg's time" in text
    assert "buys no time" not in reading(clients(), gains)
    assert crossings(gains.assign(layer="4 to 3")).startswith("- **LeNet-5**, its linear layer 4 to 3,")


def test_rehearsals_and_busy_machines_are_named():
    assert "not to be quoted" not in circumstances(record()).lower()
    assert circumstances(record(rehearsal=True)).startswith("**A rehearsal")
    assert circumstances(record(load=2.5)).startswith("**The machine was busy")


def test_a_record_comes_back_as_frames_and_a_rehearsal_judges_no_claim(tmp_path):
    assert read_cost(tmp_path) is None
    for rehearsal, rows in ((False, 6), (True, 0)):
        parts = {k: v.to_dict("records") if isinstance(v, pd.DataFrame) else v for k, v in record(rehearsal).items()}
        (tmp_path / "cost_cpu.json").write_text(json.dumps(parts))
        pd.testing.assert_frame_equal(read_cost(tmp_path)["times"], times())
        assert len(judged_clients(tmp_path)) == rows


def test_the_recorded_measurements_are_whole():
    found = read_cost(ROOT / "benchmarks")
    names = {"LeNet-5", "AlexNet (0.25)", "ResNet-18 (0.25)"}
    for frame in ("clients", "layers", "models", "times"):
        assert set(found[frame]["split" if frame == "clients" else "model"]) >= names
    sparsities, batches = found["settings"]["sparsities"], found["settings"]["batches"]
    assert len(found["layers"]) == len(names) * len(sparsities) * len(batches) * 2
    assert set(found["models"]["target"]) >= set(sparsities) and set(found["times"]["batch"]) == set(batches)


def test_rates_are_the_bytes_of_each_round_and_figures_are_stable(runs, tmp_path):
    for _, own in runs.groupby("label"):
        rates = cost_figures.rates(own, "up").query("name in @own.label")
        by_hand = own["up_bytes"].expanding().mean() / own["clients_per_round"] / 2**10
        assert rates["y"].tolist() == pytest.approx(by_hand.tolist())
    figure = cost_figures.bytes_by_method(runs, "Tiny")
    assert [panel.get_title("left") for panel in figure.axes] == ["dense to dense"] * 2 + ["sparse to sparse"] * 2
    for folder in ("a", "b"):
        save_figure(cost_figures.bytes_by_method(runs, "Tiny"), "bytes", tmp_path / folder)
    assert all(
        (tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in ("bytes.png", "bytes.svg")
    )
