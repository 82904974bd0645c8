"""What only a GPU can show; skipped, with the reason, where there is none."""

from contextlib import closing
from dataclasses import replace
from functools import partial

import pytest
import torch
from test_stacked import EQUAL, TERMS, UNEQUAL, both, config_of, flat_model, images_of, plans_of, shards_of

from feddip_lite.config import Config
from feddip_lite.core.autograd import Autograd
from feddip_lite.core.flat import FlatModel, Layout
from feddip_lite.core.models import Dropout, build_model
from feddip_lite.fast.cuda_graph import CudaGraph, called_again, record_cuda_graph
from feddip_lite.fast.together import Together
from feddip_lite.methods.registry import METHODS, settings_of
from feddip_lite.train.evaluate import evaluate_state
from feddip_lite.train.failures import check_client
from feddip_lite.train.round import run_round, train_client
from feddip_lite.train.run import running
from feddip_lite.train.setup import prepare

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
]

SMALL = dict(clients=6, clients_per_round=3, local_epochs=1, batch_size=60, rounds=3, mask_interval=2, lr=0.05)
TOLERANCE = 2e-4  # of weights after three rounds; rounding differs, and ReLU and pooling switch at ties


def three_rounds(**settings):
    config = Config(**{**SMALL, **settings}).resolved()
    state, clients, method = prepare(config)
    with closing(clients.workers), running(config):
        for _ in range(config.rounds):
            state, record = run_round(state, clients, method, config)
        return state, record, evaluate_state(state, clients)["accuracy"]


@pytest.mark.parametrize("preset", ["paper", "repo", "memory"])
def test_cpu_and_gpu_agree_over_three_rounds(preset):
    here, record_here, accuracy_here = three_rounds(preset=preset, device="cpu")
    there, record_there, accuracy_there = three_rounds(preset=preset, device="cuda")
    assert there.weights.device.type == "cuda"
    torch.testing.assert_close(there.weights.cpu(), here.weights, atol=TOLERANCE, rtol=0)
    differing = int((there.mask.cpu() != here.mask).sum())
    assert differing <= 1e-3 * len(here.mask)
    assert int(there.mask.sum()) == int(here.mask.sum())
    assert record_there.up_bytes == record_here.up_bytes
    assert record_there.train_loss == pytest.approx(record_here.train_loss, abs=1e-4)
    assert accuracy_there == pytest.approx(accuracy_here, abs=0.01)


@pytest.mark.parametrize("model", ["lenet5", "alexnet", "resnet18"])
def test_a_gpu_run_repeats_to_the_bit(model):
    first, _, _ = three_rounds(model=model, width=0.25, device="cuda")
    again, _, _ = three_rounds(model=model, width=0.25, device="cuda")
    assert torch.equal(first.weights, again.weights)
    assert torch.equal(first.mask, again.mask)
    assert torch.equal(first.buffers, again.buffers)


@pytest.mark.parametrize("model", ["lenet5", "alexnet", "resnet18"])
def test_a_client_never_waits_for_the_gpu(model):
    """A GPU that is waited for is idle while the next kernels are launched. The first call records its graphs."""
    config = Config(**{**SMALL, "model": model, "width": 0.25, "device": "cuda"}).resolved()
    state, clients, method = prepare(config)
    offer = method.offer(state, 0, 0)

    def job(scratch):
        train_client(scratch, method, offer, {}, clients, config, 0, 0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return train_client(scratch, method, offer, {}, clients, config, 0, 0)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    reply, _, result = clients.workers.submit(job).result()
    check_client(reply, result, method.layout.prunable)
    clients.workers.close()


@pytest.mark.parametrize("model", ["lenet5", "alexnet", "resnet18"])
def test_recorded_graphs_compute_what_autograd_computes(model):
    module = build_model(model, classes=10, width=0.25, channels=1 if model == "lenet5" else 3, size=32)
    both = FlatModel(module.cuda().train(), Layout.of(module), "cuda")
    images = torch.rand(7, 1 if model == "lenet5" else 3, 32, 32, device="cuda")
    labels = torch.randint(10, (7,), device="cuda")
    results = []
    for kernels in (CudaGraph(both, "float32", record_cuda_graph), Autograd(both.module, both.gradient)):
        for layer in both.module.modules():
            if isinstance(layer, Dropout):
                layer.generator.manual_seed(3)
        loss = kernels.loss_and_gradient(images, labels)
        results.append((float(loss), both.gradient.clone()))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("sizes", [EQUAL, UNEQUAL])
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("name", ["lenet5", "alexnet", "resnet18"])
def test_recorded_steps_of_all_clients_are_exactly_one_client_after_the_other_on_the_cpu(name, grouped, sizes):
    """In float64, where nothing is rounded away: what is recorded, replayed and padded is the same mathematics."""
    plans = plans_of(flat_model(name), 3, terms=TERMS["norms"], squared_gradients=True)
    alone, _ = both(name, plans, sizes)
    model, data = flat_model(name, device="cuda"), images_of(name).to("cuda")
    together = Together(model, config_of(), record_cuda_graph, grouped)
    shards = [shard.cuda() for shard in shards_of(sizes)]
    for _ in range(2):  # recorded, then replayed alone
        results = together({client: on_gpu(plan) for client, plan in plans.items()}, data, shards, 2)
    for client, one in alone.items():
        for part in ("weights", "buffers", "losses", "loss", "squared_gradients"):
            found, expected = getattr(results[client], part).cpu(), getattr(one, part)
            torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-8)


def on_gpu(plan):
    mask = plan.mask.cuda()
    return replace(plan, weights=plan.weights.cuda(), mask=mask, buffers=plan.buffers.cuda())


@pytest.mark.parametrize("sizes", [EQUAL, UNEQUAL])
@pytest.mark.parametrize("name", ["lenet5", "alexnet", "resnet18"])
def test_recorded_steps_are_the_steps_called_one_by_one(name, sizes):
    plans = {client: on_gpu(plan) for client, plan in plans_of(flat_model(name, torch.float32), 3).items()}
    model, data = flat_model(name, torch.float32, dropout=0.5, device="cuda"), images_of(name, "zeros").to("cuda")
    shards, ends = [shard.cuda() for shard in shards_of(sizes)], []
    with running(config_of()):
        for record in (record_cuda_graph, called_again):
            ends.append(Together(model, config_of(), record)(plans, data, shards, 2))
    for client in plans:
        torch.testing.assert_close(ends[0][client].weights, ends[1][client].weights, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(ends[0][client].losses, ends[1][client].losses, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"partition": "dirichlet"}, {"precision": "tf32"}, {"precision": "bf16"}])
@pytest.mark.parametrize("model", ["lenet5", "alexnet", "resnet18"])
def test_clients_together_never_wait_for_the_gpu(model, settings):
    config = Config(**{**SMALL, "model": model, "width": 0.25, "device": "cuda", **settings}).resolved()
    state, clients, method = prepare(config)
    cohort = [client for client in range(config.clients) if len(clients.train[client]) > 1][:3]
    plans = {client: method.plan(method.offer(state, 1, client), {}, 1) for client in cohort}
    train = partial(clients.together, plans, clients.data, clients.train, 1)
    with running(config):
        assert train().keys() == plans.keys()
        torch.cuda.set_sync_debug_mode("error")
        try:
            results = train()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for result in results.values():
        result.check()
    clients.workers.close()


@pytest.mark.parametrize("model", ["lenet5", "alexnet", "resnet18"])
def test_clients_together_end_where_clients_in_turn_do(model):
    """In float32, so to rounding; BatchNorm amplifies it: on a CPU to 0.02 in these rounds."""
    ends = [three_rounds(model=model, width=0.25, device="cuda", workers=workers) for workers in (1, "together")]
    distance = float((ends[1][0].weights - ends[0][0].weights).abs().max())
    assert distance < (0.2 if model == "resnet18" else 2e-3)
    assert ends[1][1].train_loss == pytest.approx(ends[0][1].train_loss, rel=5e-2)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_lower_precision_stays_near_float32(precision):
    exact, record, _ = three_rounds(device="cuda")
    rough, record_rough, _ = three_rounds(device="cuda", precision=precision)
    assert not torch.equal(exact.weights, rough.weights)
    assert record_rough.train_loss == pytest.approx(record.train_loss, rel=0.02)


@pytest.mark.parametrize(("name", "preset"), [(name, preset) for name in METHODS for preset in METHODS[name].presets])
def test_every_method_runs_on_a_gpu_and_repeats_to_the_bit(name, preset):
    own = {} if "mask_interval" in settings_of(name, preset) else {"mask_interval": None}
    runs = [three_rounds(method=name, preset=preset, device="cuda", **own) for _ in range(2)]
    assert torch.equal(runs[0][0].weights, runs[1][0].weights)
    assert torch.equal(runs[0][0].mask, runs[1][0].mask)
