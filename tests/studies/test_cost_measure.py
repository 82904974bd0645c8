"""Laws of the cost measurements: what is counted is counted right, what is timed computes the same, and a form that is
called faster is."""

import json
import math

import pandas as pd
import pytest
import torch
from conftest import FAST, tiny_config
from torch import nn

from feddip_lite.config import Config
from feddip_lite.core.flat import Layout
from feddip_lite.core.models import build_model
from feddip_lite.records.kept_model import model_file
from feddip_lite.records.store import ROOT
from feddip_lite.studies.cost import measure
from feddip_lite.studies.cost.client import client_rows
from feddip_lite.studies.cost.count import flops, packed_bytes, training_flops
from feddip_lite.studies.cost.measure import (
    BOTH,
    CSR,
    DENSE,
    SHRUNK,
    crossing,
    inference_rows,
    largest_linear,
    layer_rows,
    model_name,
    model_rows,
    num_weights,
    sizes,
    sparse_model,
    trained,
    untouched,
    untrained,
)
from feddip_lite.train.run import run

SHORT = {**FAST, "rounds": 3, "mask_interval": 1}
SHARED = {"erk": "shared"}
"""With this, a model is sparse before the first round."""


def rows_of(**forms):
    """Rows of three sparsities: `dense=[(1, 2), ...]` are the quartiles at each."""
    return pd.DataFrame(
        {"sparsity": sparsity, "form": form, "lower": lower, "median": (lower + upper) / 2, "upper": upper}
        for form, quartiles in forms.items()
        for sparsity, (lower, upper) in zip((0.5, 0.9, 0.99), quartiles, strict=True)
    )


@pytest.mark.parametrize(
    ("sparse", "expected"),
    [
        ([(1, 2), (1, 2), (1, 2)], 0.5),
        ([(5, 6), (1, 2), (1, 2)], 0.9),
        ([(1, 2), (5, 6), (1, 2)], 0.99),  # what does not last does not count
        ([(1, 2), (1, 2), (5, 6)], None),
        ([(5, 6), (5, 6), (2, 3.5)], None),  # faster by its median, but the quartiles overlap
    ],
)
def test_sparse_is_faster_from_the_sparsity_on_where_its_quartiles_stay_below(sparse, expected):
    rows = rows_of(dense=[(3, 4)] * 3, csr=sparse)
    assert crossing(rows) == crossing(rows[::-1]) == expected
    slower = rows_of(both=[(9, 9)] * 3)
    assert crossing(pd.concat([rows, slower])) == expected


def test_without_a_sparse_form_dense_is_never_beaten():
    assert crossing(rows_of(dense=[(3, 4)] * 3)) is None


def test_a_trained_model_is_that_of_the_run():
    config = tiny_config(**SHORT)
    (state, data, accuracy), history = trained(config), run(config, progress=False)
    assert accuracy == history["accuracy"].iloc[-1] and data.name == "digits"
    assert float((~state.mask).float().mean()) == pytest.approx(history["sparsity"].iloc[-1], abs=1e-6)


def test_an_untouched_model_has_the_initial_weights_and_the_first_mask_or_a_given_one(federation):
    config = tiny_config(initial_sparsity=0.8, target_sparsity=0.8, method_options=SHARED)
    start, (state, data) = federation(config)[0], untouched(config)
    assert torch.equal(state.weights, start.weights) and torch.equal(state.mask, start.mask)
    mask = torch.arange(len(start.mask)) % 3 == 0
    other, _ = untouched(config, mask)
    assert torch.equal(other.weights, start.weights) and torch.equal(other.mask, mask)
    assert sizes(state, data, config)["sparsity"] == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("name", ["lenet5", "resnet18"])
def test_sizes_are_those_of_mask_message_and_file(name):
    config = tiny_config(model=name, width=0.3 if name == "lenet5" else 0.05, method_options=SHARED)
    state, data = untouched(config)
    layout = Layout.of(sparse_model(state, data, config), image_shape=tuple(data.train_images.shape[1:]))
    row = sizes(state, data, config)
    assert (row["weights"], row["prunable"], row["kept"]) == (layout.size, layout.prunable, int(state.mask.sum()))
    assert row["sparsity"] == pytest.approx(1 - row["kept"] / row["prunable"])
    assert row["message"] == packed_bytes(layout, state) < row["dense_message"]
    assert row["flops"] == sum(flops(layout, state.mask).values()) < row["dense_flops"] == sum(flops(layout).values())
    assert row["file"] == len(model_file(layout, state.weights, state.mask, state.buffers)) < row["dense_file"]
    assert 4 * (layout.size + layout.buffer_size) < row["dense_file"]
    parts = ({}, {"mask": state.mask, "error_feedback": True}, {"mask": state.mask})
    by_hand = [training_flops(layout, config, 1, **part)["total"] for part in parts]
    assert [row[f"training_{name}"] for name in ("dense", "feedback", "masked")] == by_hand
    assert math.isnan(row["left"]) if name == "resnet18" else row["left"] <= layout.size


def test_recorded_file_sizes_are_those_of_models_with_that_many_weights():
    record = json.loads((ROOT / "benchmarks" / "cost_cpu.json").read_text())
    shapes = {model_name(Config(**each)): each for each in record["settings"]["models"]}
    for row in record["models"]:
        shape = shapes[row["model"].removesuffix(", FedDIP's masks")]
        layout = Layout.of(untrained(shape["dataset"], shape["model"], shape["width"]))
        weights, statistics = torch.zeros(layout.size), torch.zeros(layout.buffer_size)
        for name, kept in {"file": row["kept"], "dense_file": row["prunable"]}.items():
            mask = torch.arange(layout.prunable) < kept
            assert row[name] == len(model_file(layout, weights, mask, statistics))


def test_a_layer_is_timed_dense_and_csr_at_every_sparsity_and_draws_nothing_global():
    before = torch.get_rng_state()
    rows = layer_rows(40, 30, 4, (0.99, 0.5), repeats=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert [(row["sparsity"], row["form"]) for row in rows] == [(s, f) for s in (0.5, 0.99) for f in (DENSE, CSR)]
    assert all(0 < row["lower"] <= row["median"] <= row["upper"] for row in rows)


def lenet(dead: bool, sparse: bool) -> nn.Module:
    module = build_model("lenet5", classes=10, width=0.5, channels=1, size=28)
    with torch.no_grad():
        if dead:
            module.conv2.weight[0] = 0
        if sparse:
            module.fc1.weight[:, 1:] = 0
    return module.eval()


@pytest.mark.parametrize(
    ("dead", "sparse", "csr_from", "expected"),
    [
        (False, False, 0.8, {DENSE}),
        (False, True, 0.8, {DENSE, CSR, SHRUNK, BOTH}),  # a layer that reads one value leaves channels dead
        (True, False, 0.8, {DENSE, SHRUNK}),
        (True, True, None, {DENSE, SHRUNK}),
    ],
)
def test_only_forms_that_differ_are_timed(dead, sparse, csr_from, expected):
    module = lenet(dead, sparse)
    rows = model_rows(module, torch.rand(2, 1, 28, 28), csr_from, repeats=2)
    assert {row["form"] for row in rows} == expected


def test_every_form_that_is_timed_computes_the_same(monkeypatch):
    images, seen = torch.rand(2, 1, 28, 28), {}
    monkeypatch.setattr(measure, "_timed", lambda forms, *_: seen.update(forms) or [])
    model_rows(lenet(True, True), images, 0.8)
    outputs = [form.eval()(images) for form in seen.values()]
    assert len(outputs) == 5
    assert all(torch.allclose(output, outputs[0], atol=1e-6) for output in outputs)


def test_resnet_is_timed_dense_and_with_a_sparse_head_alone():
    module = build_model("resnet18", classes=10, width=0.05, channels=3, size=32)
    with torch.no_grad():
        module.linear.weight.zero_()[0] = 1
    rows = model_rows(module, torch.rand(1, 3, 32, 32), 0.8, repeats=1)
    assert [row["form"] for row in rows] == [DENSE, CSR]


def test_each_batch_size_is_timed_with_csr_where_its_layer_wins():
    wins = rows_of(dense=[(3, 4)] * 3, csr=[(1, 2)] * 3).assign(batch=2).to_dict("records")
    state, data = untouched(tiny_config(width=0.5))
    rows = inference_rows(lenet(dead=False, sparse=True), data, wins, (1, 2), repeats=1)
    forms = {batch: {row["form"] for row in rows if row["batch"] == batch} for batch in (1, 2)}
    assert CSR in forms[2] and CSR not in forms[1] and DENSE in forms[1]


def test_a_client_in_a_process_of_its_own_is_timed_and_its_memory_counted():
    forms = [{"method": "fedavg"}, {"method": "feddip", "method_options": SHARED}, {"method": "feddst"}]
    dense, feedback, masked = client_rows([{**form, "width": 0.3, "local_epochs": 1} for form in forms], samples=16)
    assert [row["label"] for row in (dense, feedback, masked)] == ["FedAvg", "FedDIP", "FedDST"]
    assert all(row["split"] == "LeNet-5 (0.3)" and row["seed"] == 0 and row["seconds"] > 0 for row in (dense, feedback))
    assert feedback["weights"] == 2 * dense["weights"] == 2 * masked["weights"]
    assert dense["mask"] == 0 < feedback["mask"] == masked["mask"] and dense["activations"] == masked["activations"]
    assert all(math.isnan(row["peak_mib"]) or 2**20 * row["peak_mib"] > row["gradient"] for row in (dense, feedback))


def test_names_and_shapes_of_models():
    assert model_name(tiny_config(width=1.0)) == "LeNet-5" and model_name(tiny_config()) == "LeNet-5 (0.3)"
    assert largest_linear(tiny_config(width=1.0)) == (120, 400)
    assert num_weights(untrained("digits", "lenet5", 1.0)) == 61706
    assert num_weights(untrained("cifar100", "resnet18", 1.0)) == 11220132
