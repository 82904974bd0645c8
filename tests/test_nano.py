"""FedDIP on one page is the oracle: with its draws filled in from the package, both compute the same rounds."""

import ast
import copy
import sys
from dataclasses import asdict, fields
from inspect import getsource

import numpy as np
import pytest
import torch
from conftest import random_bools, random_vector, tiny_data, tiny_module
from torch.nn import functional as F

from feddip_lite import nano
from feddip_lite.config import Config
from feddip_lite.core import schedules, sparsity
from feddip_lite.core.flat import Layout
from feddip_lite.core.models import MODELS, build_model
from feddip_lite.core.seeds import derive, torch_generator
from feddip_lite.train import setup
from feddip_lite.train.evaluate import evaluate_state
from feddip_lite.train.round import run_round, sample_cohort

TOLERANCE = 1e-5
GPU = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")]
SMALL = dict(rounds=10, clients=6, clients_per_round=3, local_epochs=1)
MODEL = {
    "lenet5": {"width": 0.25, "batch_size": 120, "lr": 0.05, "mask_interval": 4},
    "tiny": {"batch_size": 10, "lr": 0.1, "mask_interval": 2, "initial_sparsity": 0.85},  # BatchNorm; weights return
}
DENSE = {"initial_sparsity": 0.0, "target_sparsity": 0.0, "mask_interval": 1, "penalty_max": 0.0}  # FedAvg to nano
PRUNED = [(method, preset) for method in ("feddp", "feddip") for preset in ("paper", "repo", "memory")]


def deal_tiny(config):
    """As `setup.deal`, of 120 images for the small BatchNorm model."""
    data = tiny_data(120)
    return data, setup.split_of(data, config), np.empty(0, np.int64)


def tensors(layout, weights, buffers) -> dict:
    """The package's flat vectors as nano has them."""
    slots = [(slot, weights) for slot in layout.slots] + [(slot, buffers) for slot in layout.buffer_slots]
    return {slot.name: slot.of(vector).clone() for slot, vector in slots}


def masks(layout, mask) -> dict:
    return {slot.name: slot.of(mask) for slot in layout.prunable_slots}


@pytest.fixture
def prepared(monkeypatch, federation):
    """`prepared(method, preset, partition, model)` is (resolved configuration, state, clients, method, network) of ten
    rounds with two local steps each."""
    monkeypatch.setitem(MODELS, "tiny", lambda *shape: tiny_module())

    def prepare(method: str, preset: str, partition: str, model: str):
        config = config_of(method, preset, partition, model)
        if model == "tiny":
            return config, *federation(config, deal_tiny), tiny_module()
        net = build_model(model, classes=10, width=config.width, channels=1, size=28)
        return config, *federation(config), net

    return prepare


def config_of(method: str, preset: str, partition: str, model: str) -> Config:
    settings = {**SMALL, **MODEL[model], "model": model, "method": method, "preset": preset, "partition": partition}
    if method == "fedavg":
        settings |= {"target_sparsity": 0.0, "initial_sparsity": None, "mask_interval": None}
    if method == "feddip":
        settings["penalty_max"] = 0.05  # large enough that a wrong penalty could not hide in the tolerance
    return Config(**settings).resolved()


def nano_rounds(config, state, clients, method, net, **changes):
    """nano's rounds, from the package's initial weights and with its draws."""
    own = {field.name for field in fields(nano.Settings)}
    values = {name: value for name, value in asdict(config).items() if name in own}
    values |= {"fedavg": DENSE, "feddp": {"penalty_max": 0.0}, "feddip": {}}[config.method]

    def first_mask(s, w, names, client):
        mask = method.erk_mask(derive(config.seed, "mask", 0, client)) if s.target_sparsity else state.mask
        return masks(method.layout, mask)

    return nano.train(
        net, tensors(method.layout, state.weights, state.buffers), clients.data, clients.train, clients.test,
        nano.Settings(**{**values, **changes}), cohort=lambda s, t: sample_cohort(config, t), first_mask=first_mask,
        shuffle=lambda s, t, client: torch_generator(config.seed, "shuffle", t, client),
    )  # fmt: skip


@pytest.mark.parametrize("model", MODEL)
@pytest.mark.parametrize("partition", ["iid", "pathological"])
@pytest.mark.parametrize(("method", "preset"), [("fedavg", "paper"), *PRUNED])
def test_ten_rounds_of_nano_are_ten_rounds_of_the_package(method, preset, partition, model, prepared):
    config, state, clients, ours, net = prepared(method, preset, partition, model)
    for t, (w, m, strength, loss) in enumerate(nano_rounds(config, state, clients, ours, net)):
        state, record = run_round(state, clients, ours, config)
        expected = tensors(ours.layout, state.weights, state.buffers)
        for name, mask in masks(ours.layout, state.mask).items():
            assert torch.equal(m[name], mask), f"round {t}: {name}"
        assert w.keys() == expected.keys()
        assert norm({name: w[name] - expected[name] for name in w}) < TOLERANCE * norm(expected)
        assert strength == record.penalty
        assert loss == pytest.approx(record.train_loss, abs=TOLERANCE)
    assert nano.evaluate(net, w, m, clients.data) == pytest.approx(evaluate_state(state, clients)["accuracy"])


def norm(w: dict) -> float:
    """Over all tensors. (A unit that rounding switches off moves single weights by 1e-5, and the model by 1e-6.)"""
    return float(torch.cat([value.flatten() for value in w.values()]).norm())


def test_what_tells_the_presets_apart_acts_in_these_rounds(prepared):
    start, kept, seen = prepared("feddip", "paper", "pathological", "tiny"), {}, {}
    for preset in ("paper", "repo", "memory"):
        *_, (w, m, _, _) = nano_rounds(*start, preset=preset)
        kept[preset] = torch.cat([mask.flatten() for mask in m.values()])
        seen[preset] = w["norm.running_var"]
    assert not any(torch.equal(kept["paper"], kept[other]) for other in ("repo", "memory"))
    assert not torch.allclose(seen["paper"], seen["repo"], rtol=0.01)


def test_prunable_names_are_those_of_the_layout():
    for net in (tiny_module(), nano.lenet5()):
        assert nano.prunable(net) == [slot.name for slot in Layout.of(net).prunable_slots]


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1, 0.01])
@pytest.mark.parametrize("net", [tiny_module(), nano.lenet5()], ids=["tiny", "lenet5"])
def test_random_mask_is_the_package_s(net, density):
    layout, names = Layout.of(net), nano.prunable(net)
    shapes = [slot.shape for slot in layout.prunable_slots]
    densities = sparsity.erk_densities(shapes, density)
    assert nano.erk_densities(shapes, density) == pytest.approx(densities, rel=1e-12)
    draws = [torch.Generator().manual_seed(5) for _ in range(2)]
    ours = masks(layout, sparsity.random_mask(layout, densities, draws[0]))
    for name, mask in nano.random_mask(dict(net.named_parameters()), names, density, draws[1]).items():
        assert torch.equal(mask, ours[name])


@pytest.mark.parametrize("target", [0.0, 0.5, 0.9, 0.995])
def test_topk_mask_is_the_package_s_ties_too(target, layout):
    weights = random_vector(layout.size).mul(4).round()  # many are equal
    kept = sparsity.topk_mask(weights[: layout.prunable].abs(), sparsity.num_kept(target, layout.prunable))
    ours = masks(layout, kept)
    found = nano.topk_mask(tensors(layout, weights, torch.zeros(layout.buffer_size)), list(ours), target)
    for name, mask in ours.items():
        assert torch.equal(found[name], mask)


@pytest.mark.parametrize("rounds", [1, 7, 20, 100])
def test_schedules_are_the_package_s(rounds):
    for t in range(rounds):
        assert nano.sparsity_at(t, 0.5, 0.9, rounds) == schedules.sparsity_at(t, 0.5, 0.9, rounds)
        assert nano.penalty_at(t, 1e-3, 20, rounds) == schedules.penalty_at(t, 1e-3, 20, rounds)
        assert nano.published_penalty_at(t, 1e-3, 20, rounds) == schedules.published_penalty_at(t, 1e-3, 20, rounds)


@pytest.mark.parametrize("strength", [0.0, 0.05])
def test_local_update_is_stock_sgd_with_the_gradient_of_a_masked_copy(strength):
    net, data = tiny_module(), tiny_data()
    w, m = dict(net.state_dict()), {name: random_bools(net.get_parameter(name).numel()) for name in nano.prunable(net)}
    m = {name: mask.view(w[name].shape) for name, mask in m.items()}
    before = copy.deepcopy(w)
    batches = list(nano.batches(data, torch.arange(20), 8, 2, torch.Generator().manual_seed(0)))
    assert [len(labels) for _, labels in batches] == [8, 8, 4] * 2
    found, loss = nano.local_update(net, w, m, batches, 0.1, 5e-4, strength)
    assert w.keys() == before.keys() and all(torch.equal(w[name], before[name]) for name in w)

    dense, losses = copy.deepcopy(net).train(), []
    sgd = torch.optim.SGD(dense.parameters(), lr=0.1, weight_decay=5e-4)
    for images, labels in batches:
        sparse = copy.deepcopy(dense)
        sparse.load_state_dict(nano.masked(dense.state_dict(), m))
        cross_entropy = F.cross_entropy(sparse(images), labels)
        (cross_entropy + strength * sum(sparse.get_parameter(name).norm() for name in m)).backward()
        for own, lent in zip(dense.parameters(), sparse.parameters(), strict=True):
            own.grad = lent.grad
        sgd.step()
        for own, seen in zip(dense.buffers(), sparse.buffers(), strict=True):
            own.copy_(seen)
        losses += [cross_entropy.item()] * len(labels)
    for name, value in dense.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)
    assert float(loss) == pytest.approx(sum(losses) / len(losses), abs=1e-6)


def test_a_tensor_pruned_to_nothing_has_a_penalty_without_gradient():
    w = {"a": torch.zeros(3, requires_grad=True), "b": torch.tensor([3.0, 4.0], requires_grad=True)}
    total = nano.penalty(w, w)
    assert total == 5
    for gradient, expected in zip(torch.autograd.grad(total, list(w.values())), ([0, 0, 0], [0.6, 0.8]), strict=True):
        torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float32))


def test_nano_imports_nothing_of_ours_but_the_data():
    imports = [node for node in ast.walk(ast.parse(getsource(nano))) if isinstance(node, ast.Import | ast.ImportFrom)]
    ours = [node.module for node in imports if isinstance(node, ast.ImportFrom) and node.level]
    others = {name.name.partition(".")[0] for node in imports if isinstance(node, ast.Import) for name in node.names}
    others |= {node.module.partition(".")[0] for node in imports if isinstance(node, ast.ImportFrom) and not node.level}
    assert ours == ["data.datasets", "data.partition"]
    assert others - sys.stdlib_module_names == {"numpy", "torch"}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_nano_learns_the_digits_at_90_percent_sparsity(device, capsys):
    assert nano.main(device) >= 0.93
    head, *rows, end = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["round", "sparsity", "penalty"]
    assert [int(row.split()[0]) for row in rows] == list(range(nano.Settings().rounds))
    assert end.startswith("pruned to 0.9: ")
