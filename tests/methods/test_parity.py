"""FedDIP's preset `repo` gives the numbers of the published code, masks and weights (tests/recorded/README.md)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from feddip_lite.config import Config
from feddip_lite.core.autograd import Autograd
from feddip_lite.core.schedules import sparsity_at
from feddip_lite.data.datasets import dataset_of
from feddip_lite.data.partition import Split
from feddip_lite.train.round import run_round
from feddip_lite.train.setup import prepare

PUBLISHED = np.load(Path(__file__).parents[1] / "recorded" / "lenet_repo.npz")
NAMES = {
    "conv1": "features.0",
    "conv2": "features.3",
    "fc1": "classifier.0",
    "fc2": "classifier.2",
    "fc3": "classifier.4",
}
ROUNDS = (9, 10, 11)
CONFIG = Config(
    method="feddip", preset="repo", dataset="fashionmnist", rounds=40, clients=3, clients_per_round=3, local_epochs=2,
    device="cpu",
).resolved()  # fmt: skip
TOLERANCE = 1e-6


def deal(config):
    """The file's images, client after client; testing is no part of a round."""
    part = {"images": PUBLISHED["images"][:, 0], "labels": PUBLISHED["labels"]}
    arrays = {f"{name}_{key}": value for name in ("train", "test") for key, value in part.items()}
    owned = np.split(np.arange(len(part["labels"])), np.cumsum(PUBLISHED["sizes"])[:-1])
    data = dataset_of("fashionmnist", arrays, "tests/recorded/lenet_repo.npz", "", "")
    return data, Split(tuple(owned), tuple(owned)), np.empty(0, np.int64)


def vector(layout, prefix, suffix="", slots=None):
    """The published tensors `prefix`... as one vector of this layout."""
    parts = []
    for slot in slots or layout.slots:
        layer, kind = slot.name.split(".")
        parts.append(torch.from_numpy(PUBLISHED[f"{prefix}.{NAMES[layer]}.{kind}{suffix}"]).flatten())
    return torch.cat(parts)


@pytest.mark.parametrize("stock", [False, True], ids=["as it runs", "stock operators"])
def test_three_masked_rounds_equal_the_published_code(stock):
    state, clients, method = prepare(CONFIG, deal)
    layout = method.layout
    if stock:
        for job in [clients.workers.submit(use_stock_operators) for _ in range(3)]:
            job.result()
    mask = vector(layout, "m0", "_mask", layout.prunable_slots)
    state = type(state)(ROUNDS[0], vector(layout, "w0"), state.buffers, mask)
    for number, t in enumerate(ROUNDS):
        state, record = run_round(state, clients, method, CONFIG)
        assert record.round == t
        assert record.lr == pytest.approx(float(PUBLISHED[f"r{number}.lr"]), rel=1e-12)
        assert record.penalty == pytest.approx(float(PUBLISHED[f"r{number}.lambda"]), rel=1e-12)
        assert sparsity_at(t, 0.5, 0.9, 40) == pytest.approx(float(PUBLISHED[f"r{number}.s"]), rel=1e-12)
        assert torch.equal(state.mask, vector(layout, f"r{number}.m", "_mask", layout.prunable_slots))
        sparse = layout.masked(state.weights, state.mask)
        torch.testing.assert_close(sparse, vector(layout, f"r{number}.g"), atol=TOLERANCE, rtol=0)
    clients.workers.close()


def use_stock_operators(model):
    model.kernels = Autograd(model.module, model.gradient)


def test_the_file_has_a_round_that_chooses_a_mask_and_steps_far_above_the_tolerance():
    masks = [np.concatenate([PUBLISHED[name].ravel() for name in sorted(PUBLISHED) if name.startswith(f"r{n}.m.")])
             for n in range(3)]  # fmt: skip
    assert (masks[0] != masks[1]).any()
    assert (masks[1] == masks[2]).all()
    for n in (1, 2):
        step = PUBLISHED[f"r{n}.g.classifier.4.bias"] - PUBLISHED[f"r{n - 1}.g.classifier.4.bias"]
        assert np.abs(step).max() > 1000 * TOLERANCE
