"""Laws of layers and masks: counts come back, ERK keeps the total, chance is what random masks do."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config

from feddip_lite.core.sparsity import jaccard
from feddip_lite.records.store import read_mask, read_run, sealed
from feddip_lite.studies.layers import (
    across_seeds,
    overlap_by_chance,
)
from feddip_lite.train.run import train

TWO = {"rounds": 2, "clients": 3, "clients_per_round": 2, "local_epochs": 1}
pytestmark = pytest.mark.usefixtures("agg")

QUEUE = [tiny_config(method="feddip", seed=seed, target_sparsity=0.8, **TWO) for seed in (0, 1, 2)]
QUEUE += [tiny_config(method="fedavg", target_sparsity=0.8, **TWO)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("results")
    train(QUEUE, path)
    return path


@pytest.fixture(scope="module")
def runs(folder):
    return train(QUEUE, folder)


def test_seeds_are_compared_pair_by_pair_whole_and_by_tensor(folder, runs):
    pairs = across_seeds(folder, runs)
    masks = [read_mask(folder, config.run_id) for config in QUEUE[:3]]
    whole = pairs[pairs["layer"] == "all"]
    assert list(whole["seeds"]) == ["0, 1", "0, 2", "1, 2"]
    expected = [jaccard(masks[a], masks[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    np.testing.assert_allclose(whole["overlap"], expected)
    tensors = read_run(folder, QUEUE[0].run_id)[1]["layers"]
    assert len(pairs) == 3 * (1 + len(tensors))
    assert pairs[["overlap", "chance"]].stack().between(0, 1).all()


@pytest.mark.parametrize("densities", [(0.1, 0.1), (0.5, 0.02), (1.0, 0.3)])
def test_chance_is_the_overlap_of_random_masks_with_the_same_counts(densities):
    sizes, draw = [4000, 20000], torch.Generator().manual_seed(0)
    counts = [round(size * density) for size, density in zip(sizes, densities, strict=True)]

    def mask():
        parts = [torch.randperm(size, generator=draw) < count for size, count in zip(sizes, counts, strict=True)]
        return torch.cat(parts)

    found = [jaccard(mask(), mask()) for _ in range(20)]
    assert overlap_by_chance(counts, counts, sizes) == pytest.approx(np.mean(found), rel=0.02)


def test_chance_is_one_for_full_masks_and_for_empty_ones():
    assert overlap_by_chance([3, 5], [3, 5], [3, 5]) == 1.0
    assert overlap_by_chance([0], [0], [4]) == 1.0
    assert overlap_by_chance([4], [0], [4]) == 0.0


def test_old_records_are_left_out(folder, runs, tmp_path):
    for path in filter(Path.is_file, folder.iterdir()):
        shutil.copy(path, tmp_path)
    old = tmp_path / f"{QUEUE[0].run_id}.json"
    record = {key: value for key, value in json.loads(old.read_text()).items() if key not in ("layers", "sha256")}
    old.write_bytes(sealed(json.dumps(record, indent=1).removesuffix("\n}").encode()))
    assert list(across_seeds(tmp_path, runs)["seeds"].unique()) == ["1, 2"]
