"""Laws of clients trained at once: exact mathematics, the same as one after the other, whatever their sizes."""

from contextlib import closing
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import random_bools, random_vector, tiny_config

from feddip_lite.config import Config
from feddip_lite.core.autograd import Autograd
from feddip_lite.core.errors import Diverged
from feddip_lite.core.flat import FlatModel, Layout
from feddip_lite.core.models import Dropout, build_model
from feddip_lite.core.plan import LocalPlan
from feddip_lite.core.terms import NormTerm, ProximalTerm, SquareTerm, Terms, WithoutPruned
from feddip_lite.data.datasets import Dataset
from feddip_lite.fast.cuda_graph import called_again
from feddip_lite.fast.together import Together, kind_of
from feddip_lite.methods import METHODS
from feddip_lite.methods.fedavg import FedAvg
from feddip_lite.train.client import local_update
from feddip_lite.train.evaluate import evaluate_state
from feddip_lite.train.round import run_round
from feddip_lite.train.setup import prepare

WIDTHS = {"lenet5": 0.3, "alexnet": 0.05, "resnet18": 0.05}
EQUAL, UNEQUAL = (6, 6, 6), (6, 2, 9)
CONFIG = {"batch_size": 4, "local_epochs": 2, "lr": 0.05, "weight_decay": 0.01}


def config_of(**settings) -> Config:
    return tiny_config(**{**CONFIG, **settings}).resolved()


def flat_model(name: str, dtype=torch.float64, dropout: float = 0.0, device="cpu", precision="float32") -> FlatModel:
    channels = 1 if name == "lenet5" else 3
    size = 20 if name == "lenet5" else 32
    module = build_model(name, classes=4, width=WIDTHS[name], channels=channels, size=size, seed=1)
    for layer in module.modules():
        if isinstance(layer, Dropout):
            layer.p = dropout
    model = FlatModel(module, Layout.of(module), device, dtype)
    model.kernels = Casting(Autograd(module, model.gradient, precision), dtype)
    return model


class Casting:
    """`kernels` that take images of another precision."""

    def __init__(self, kernels, dtype):
        self.kernels, self.dtype = kernels, dtype

    def loss_and_gradient(self, images, labels):
        return self.kernels.loss_and_gradient(images.to(self.dtype), labels)

    def logits(self, images):
        return self.kernels.logits(images.to(self.dtype))


def images_of(name: str, augmentation=None) -> Dataset:
    draw = torch.Generator().manual_seed(3)
    shape = (60, 1, 20, 20) if name == "lenet5" else (60, 3, 32, 32)
    parts = [torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8) for _ in range(2)]
    labels = [torch.randint(4, (60,), generator=draw) for _ in range(2)]
    values = {"scale": 255.0, "mean": (0.4,), "std": (0.3,), "augmentation": augmentation}
    if shape[1] == 3:
        values |= {"mean": (0.4, 0.5, 0.6), "std": (0.3, 0.2, 0.25)}
    return Dataset("made", 4, parts[0], labels[0], parts[1], labels[1], **values, source="", sha256="", variant="")


def shards_of(sizes) -> list[torch.Tensor]:
    order = torch.randperm(60, generator=torch.Generator().manual_seed(4))
    return list(order[: sum(sizes)].split(list(sizes)))


def plans_of(
    model, clients, *, masked=True, project=False, terms=lambda plan, layout: None, **more
) -> dict[int, LocalPlan]:
    """A plan for each client, from weights of its own."""
    layout, start = model.layout, model.weights.clone()
    plans = {}
    for client in range(clients):
        weights = start + 0.02 * random_vector(layout.size, client).to(start.dtype)
        mask = random_bools(layout.prunable, 0.6, client) if masked else None
        buffers = 0.5 + 0.1 * random_vector(layout.buffer_size, client).abs().to(start.dtype)
        plan = LocalPlan(weights, mask, buffers, project=project, **more)
        plans[client] = replace(plan, add_gradient_=terms(plan, layout))
    return plans


def both(name, plans, sizes, *, grouped=True, dtype=torch.float64, dropout=0.0, augmentation=None, **settings):
    """(results one after the other, results together), by client."""
    config = config_of(**settings)
    model = flat_model(name, dtype, dropout, precision=config.precision)
    data, shards = images_of(name, augmentation), shards_of(sizes)
    update = partial(local_update, model, data=data, config=config, t=2)
    alone = {client: update(plan, indices=shards[client], client=client) for client, plan in plans.items()}
    return alone, Together(model, config, called_again, grouped)(plans, data, shards, 2)


def assert_same(alone, together):
    assert alone.keys() == together.keys()
    for client, one in alone.items():
        other = together[client]
        for name in ("weights", "buffers", "losses", "loss", "squared_gradients"):
            expected, found = getattr(one, name), getattr(other, name)
            assert (expected is None) == (found is None)
            if expected is not None:
                assert found.dtype == expected.dtype and found.shape == expected.shape
                torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
        assert other.mask is one.mask and (other.samples, other.client) == (one.samples, one.client)


@pytest.mark.parametrize("sizes", [EQUAL, UNEQUAL])
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("name", ["lenet5", "alexnet", "resnet18"])
def test_it_is_exactly_one_client_after_the_other(name, grouped, sizes):
    assert_same(*both(name, plans_of(flat_model(name), 3), sizes, grouped=grouped))


@pytest.mark.parametrize("sizes", [EQUAL, UNEQUAL])
@pytest.mark.parametrize(("masked", "project"), [(False, False), (True, True)])
def test_dense_and_projected_training_too(masked, project, sizes):
    plans = plans_of(flat_model("lenet5"), 3, masked=masked, project=project)
    assert_same(*both("lenet5", plans, sizes))


@pytest.mark.parametrize("name", ["lenet5", "alexnet", "resnet18"])
def test_in_float32_it_is_the_same_to_rounding(name):
    plans = plans_of(flat_model(name, torch.float32), 3)
    alone, together = both(name, plans, (6, 3, 10), dtype=torch.float32)
    for client, one in alone.items():  # BatchNorm over a few samples amplifies rounding
        moved = (one.weights - plans[client].weights).norm()
        assert (together[client].weights - one.weights).norm() < (2e-2 if name == "resnet18" else 1e-4) * moved
        torch.testing.assert_close(together[client].losses, one.losses, atol=1e-3, rtol=1e-3)


TERMS = {
    "norms": lambda plan, layout: NormTerm(layout, 0.02),
    "squares": lambda plan, layout: SquareTerm(layout, 0.02),
    "proximal": lambda plan, layout: ProximalTerm(plan.weights, 0.3),
    "only what is kept": lambda plan, layout: Terms((WithoutPruned(plan.mask), NormTerm(layout, 0.02))),
}


@pytest.mark.parametrize("sizes", [EQUAL, UNEQUAL])
@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("term", TERMS)
def test_penalties_and_proximal_terms_are_added(term, project, sizes):
    plans = plans_of(flat_model("lenet5"), 3, project=project, terms=TERMS[term])
    alone, together = both("lenet5", plans, sizes)
    assert_same(alone, together)
    without = both("lenet5", plans_of(flat_model("lenet5"), 3, project=project), sizes)[0]
    assert not torch.allclose(without[0].weights, alone[0].weights)


def test_a_tensor_pruned_to_nothing_gets_no_penalty_and_no_nan():
    plans = plans_of(flat_model("lenet5"), 3, terms=TERMS["norms"])
    plans[1].mask[: plans[1].mask.numel() // 2] = False
    plans[1].mask[:] &= False
    alone, together = both("lenet5", plans, EQUAL)
    assert_same(alone, together)
    assert together[1].weights.isfinite().all()


@pytest.mark.parametrize("sizes", [EQUAL, UNEQUAL])
def test_squared_gradients_are_summed_over_a_clients_own_steps(sizes):
    plans = plans_of(flat_model("lenet5"), 3, squared_gradients=True, terms=TERMS["norms"])
    assert_same(*both("lenet5", plans, sizes))


@pytest.mark.parametrize("grouped", [True, False])
def test_dropout_draws_what_each_client_draws_alone(grouped):
    plans = plans_of(flat_model("alexnet"), 3)
    alone, together = both("alexnet", plans, UNEQUAL, grouped=grouped, dropout=0.5)
    assert_same(alone, together)
    assert not torch.allclose(both("alexnet", plans, UNEQUAL)[0][0].weights, alone[0].weights)


@pytest.mark.parametrize("augmentation", ["zeros", "reflect"])
def test_crops_are_those_of_each_client_alone(augmentation):
    plans = plans_of(flat_model("alexnet"), 3)
    assert_same(*both("alexnet", plans, UNEQUAL, augmentation=augmentation))


def test_clients_may_go_through_their_data_unequally_often():
    plans = plans_of(flat_model("lenet5"), 3)
    plans[1] = replace(plans[1], epochs=5)
    assert_same(*both("lenet5", plans, UNEQUAL))


def test_bf16_stays_near_one_client_after_the_other():
    plans = plans_of(flat_model("alexnet", torch.float32), 3)
    alone, together = both("alexnet", plans, UNEQUAL, dtype=torch.float32, dropout=0.5, precision="bf16")
    for client, one in alone.items():
        moved = (one.weights - plans[client].weights).norm()
        assert (together[client].weights - one.weights).norm() < 0.02 * moved


class Counting:
    """A recorder that calls the step several times before the first replay, as capturing does."""

    def __init__(self):
        self.recorded = 0

    def __call__(self, function, generators):
        self.recorded += 1
        for _ in range(4):
            function()
        return None, function


def test_recording_leaves_no_trace_and_happens_once_per_batch_shape():
    model, config, recorder = flat_model("resnet18"), config_of(), Counting()
    data, shards = images_of("resnet18"), shards_of((6, 6, 6, 9, 9, 4))
    plain, recorded = Together(model, config, called_again), Together(model, config, recorder)
    everyone = plans_of(model, 6)
    # Recorded are 4 and 2; again; then 4 of 4 and ragged ones; again; then 1 where all have it, and 4 again.
    for cohort, recordings in (((0, 1), 2), ((1, 2), 2), ((2, 5), 3), ((1, 3), 3), ((3, 4), 4)):
        plans = {client: everyone[client] for client in cohort}
        assert_same(plain(plans, data, shards, 1), recorded(plans, data, shards, 1))
        assert recorder.recorded == recordings, cohort


def test_few_sizes_are_recorded_however_many_there_are():
    model, config, recorder = flat_model("lenet5"), config_of(), Counting()
    data, shards = images_of("lenet5"), shards_of((5, 5, 6, 6, 7, 7, 8, 8))  # last batches of 1, 2, 3 and 4
    together, everyone = Together(model, config, recorder), plans_of(model, 8)
    for first in (0, 2, 4, 6):
        together({client: everyone[client] for client in (first, first + 1)}, data, shards, 1)
    assert recorder.recorded == 2  # 4, and ragged


def test_a_batch_is_no_larger_than_the_largest_client():
    plans = plans_of(flat_model("alexnet"), 3)
    assert_same(*both("alexnet", plans, (6, 5, 6), dropout=0.5, batch_size=500))


def test_a_client_that_has_finished_stays_finite_whatever_the_others_still_do():
    plans = plans_of(flat_model("resnet18", torch.float32), 3)
    plans[2] = replace(plans[2], epochs=6)
    for result in both("resnet18", plans, UNEQUAL, dtype=torch.float32)[1].values():
        result.check()


def test_a_client_that_diverges_is_alone_in_it():
    plans = plans_of(flat_model("resnet18"), 3)
    plans[1] = replace(plans[1], weights=torch.full_like(plans[1].weights, float("nan")))
    alone, together = both("resnet18", plans, UNEQUAL)
    with pytest.raises(Diverged):
        together.pop(1).check()
    del alone[1]
    assert_same(alone, together)


def test_inputs_are_left_alone_and_results_have_memory_of_their_own():
    model, config = flat_model("resnet18"), config_of()
    together, plans = Together(model, config, called_again), plans_of(model, 3)
    before = {client: [t.clone() for t in (p.weights, p.mask, p.buffers)] for client, p in plans.items()}
    first = together(plans, images_of("resnet18"), shards_of(EQUAL), 0)
    kept = {client: result.weights.clone() for client, result in first.items()}
    together(plans, images_of("resnet18"), shards_of(UNEQUAL), 1)
    for client, plan in plans.items():
        assert all(map(torch.equal, (plan.weights, plan.mask, plan.buffers), before[client]))
        assert torch.equal(first[client].weights, kept[client])


ODD = [
    {"mode": "score"},
    {"mode": "refresh"},
    {"epochs": 0},
    {"final_gradient": "batch"},
    {"then": lambda result: None},
    {"dense_statistics": True},
    {"buffers": None},
    {"model": flat_model("lenet5")},
    {"add_gradient_": lambda gradient, masked, dense: None},
    {"add_gradient_": ProximalTerm(torch.zeros(3), 0.1)},
    {"add_gradient_": NormTerm(flat_model("lenet5").layout, 0.1)},
    {"add_gradient_": WithoutPruned(torch.ones(3, dtype=torch.bool))},
]


@pytest.mark.parametrize("change", ODD, ids=lambda change: next(iter(change)))
def test_a_plan_that_asks_for_more_goes_the_usual_way(change):
    model = flat_model("resnet18")
    plan = plans_of(model, 1)[0]
    assert kind_of(plan, model.layout) is not None
    assert kind_of(replace(plan, **change), model.layout) is None


def test_who_has_no_company_or_no_data_goes_the_usual_way():
    model, config = flat_model("lenet5"), config_of()
    together, data = Together(model, config, called_again), images_of("lenet5")
    plans = plans_of(model, 4)
    plans[0] = replace(plans[0], mask=None)
    assert set(together(plans, data, shards_of((5, 5, 5, 5)), 0)) == {1, 2, 3}
    assert set(together(plans, data, shards_of((5, 5, 0, 5)), 0)) == {1, 3}
    assert together({0: plans[0]}, data, shards_of((5,)), 0) == {}


RUNS = [
    {"method": "fedavg"},
    {"method": "feddip", "mask_interval": 2},
    {"method": "feddip", "mask_interval": 2, "preset": "repo"},
    {"method": "feddip", "mask_interval": 2, "method_options": {"feedback": "none"}},
    {"method": "fedprox"},
    {"method": "feddst", "mask_interval": 2},
    {"method": "prunefl", "mask_interval": 2},
    {"method": "fedlp", "method_options": {"variant": "hetero"}},
    {"method": "fedavg", "partition": "dirichlet"},
]


@pytest.mark.parametrize("settings", RUNS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_a_run_of_clients_together_is_a_run_of_clients_in_turn_to_rounding(settings):
    ends = []
    for workers in (1, "together"):
        config = tiny_config(**settings, workers=workers, clients=8).resolved()
        state, clients, method = prepare(config)
        assert (clients.together is None) == (workers == 1)
        with closing(clients.workers):
            for _ in range(config.rounds):
                state, record = run_round(state, clients, method, config)
            ends.append((state, record, evaluate_state(state, clients)["accuracy"]))
    (one, record, accuracy), (other, record_other, accuracy_other) = ends
    torch.testing.assert_close(other.weights, one.weights, atol=1e-4, rtol=1e-3)
    assert int((other.mask != one.mask).sum()) <= 2
    assert (record_other.up_bytes, record_other.down_bytes) == (record.up_bytes, record.down_bytes)
    assert record_other.train_loss == pytest.approx(record.train_loss, rel=1e-4)
    assert accuracy_other == pytest.approx(accuracy, abs=0.01)


def test_who_trains_together_and_who_does_not():
    def chosen(**settings):
        state, clients, method = prepare(tiny_config(**settings).resolved())
        clients.workers.close()
        return clients.together

    assert chosen(workers="auto") is None and chosen(workers=2) is None  # on a CPU
    assert chosen(workers="together") is not None
    assert chosen(workers="together", client_timeout=5.0) is None  # a client's own clock


def test_a_client_that_cannot_plan_fails_by_itself(monkeypatch):
    class Failing(FedAvg):
        def plan(self, offer, memory, t):
            plan = super().plan(offer, memory, t)
            if int(offer.extras["client"][0]) == 1:
                raise RuntimeError("no plan")
            return plan

        def offer(self, state, t, client):
            return super().offer(state, t, client).plus(client=torch.tensor([client]))

    monkeypatch.setitem(METHODS, "failing", Failing)
    config = tiny_config(method="failing", clients=3, workers="together", on_client_failure="skip").resolved()
    state, clients, method = prepare(config)
    with closing(clients.workers):
        _, record = run_round(state, clients, method, config)
    assert dict(record.skipped) == {1: "RuntimeError: no plan"}
    assert set(record.exchange.replies) == {0, 2}
