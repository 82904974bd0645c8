"""What only a GPU can show; skipped, with the reason, where there is none."""

import pytest
import torch

from feddip_lite.config import Config
from feddip_lite.federation import prepare
from feddip_lite.server import evaluate_state, run_round

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
]

SMALL = dict(clients=6, clients_per_round=3, local_epochs=1, batch_size=60, rounds=3, mask_interval=2, lr=0.05)
TOLERANCE = 2e-4  # of weights after three rounds; rounding differs, and ReLU and pooling switch at ties


def three_rounds(**settings):
    config = Config(**{**SMALL, **settings}).resolved()
    state, clients, method = prepare(config)
    for _ in range(config.rounds):
        state, record = run_round(state, clients, method, config)
    accuracy = evaluate_state(state, clients)["accuracy"]
    clients.workers.close()
    return state, record, accuracy


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


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_lower_precision_stays_near_float32(precision):
    exact, record, _ = three_rounds(device="cuda")
    rough, record_rough, _ = three_rounds(device="cuda", precision=precision)
    assert not torch.equal(exact.weights, rough.weights)
    assert record_rough.train_loss == pytest.approx(record.train_loss, rel=0.02)
