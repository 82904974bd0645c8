"""Laws of how local models merge: alignment's limits, what looking on may not change, the server's own mean."""

import math
from dataclasses import dataclass, replace

import pandas as pd
import pytest
import torch
from conftest import random_vector, tiny_config

from feddip_lite import run
from feddip_lite.methods import METHODS
from feddip_lite.methods.fedavg import FedAvg
from feddip_lite.records.catalogue import profile_queue, recorded
from feddip_lite.records.profiles import load_profile
from feddip_lite.records.store import ROOT, read_run, save_table
from feddip_lite.studies.claims import claims_table
from feddip_lite.studies.merging import MEASURES, alignment, per_run, record_merging
from feddip_lite.studies.trajectory import STATE_COLUMNS

THIRDS = torch.full((3,), 1 / 3, dtype=torch.float64)


def moves_of(count: int = 3, size: int = 50) -> torch.Tensor:
    """(count, size) float64, standard normal."""
    return torch.stack([random_vector(size, seed).double() for seed in range(count)])


def test_alignment_is_one_for_like_moves_a_share_for_orthogonal_ones_and_zero_where_they_cancel():
    move = random_vector(50).double()
    assert alignment(torch.stack([move] * 3), THIRDS) == pytest.approx(1.0)
    assert alignment(2.5 * torch.eye(3, 50, dtype=torch.float64), THIRDS) == pytest.approx(1 / 3)
    assert alignment(torch.stack([move, -move, 0 * move]), THIRDS) == pytest.approx(0.0, abs=1e-15)
    assert math.isnan(alignment(torch.zeros(3, 50, dtype=torch.float64), THIRDS))


def test_alignment_knows_no_unit_no_order_and_no_direction():
    moves, shares = moves_of(), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    order, turn = torch.tensor([2, 0, 1]), torch.linalg.qr(moves_of(50))[0]
    found = alignment(moves, shares)
    assert 0 < found < 1
    for other in (
        alignment(-7 * moves, shares),
        alignment(moves[order], shares[order]),
        alignment(moves @ turn, shares),
    ):
        assert other == pytest.approx(found)


def test_a_client_that_counts_for_two_is_two_clients():
    moves = moves_of()
    twice = alignment(moves[[0, 0, 1, 2]], torch.full((4,), 0.25, dtype=torch.float64))
    assert alignment(moves, torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)) == pytest.approx(twice)


@pytest.mark.parametrize("method", ["fedavg", "feddip", "feddst"])
def test_the_mean_of_local_models_is_the_servers_next_one_where_no_mask_changes(tmp_path, method):
    rows = record_merging(tiny_config(method=method, mask_interval=100 if method != "fedavg" else None), tmp_path)
    assert list(rows) == [*STATE_COLUMNS, *MEASURES, "seconds"]
    merged = (rows["members_accuracy"] + rows["merging_gain"]).iloc[1:-1]  # from round 1: in round 0 masks are chosen
    assert merged.tolist() == pytest.approx(rows["accuracy"].iloc[2:].tolist(), abs=1e-12)
    assert rows[list(MEASURES)].iloc[-1].isna().all() and rows["alignment"].iloc[:-1].between(0, 1).all()


def test_one_client_is_its_own_mean(tmp_path):
    rows = record_merging(tiny_config(clients_per_round=1, rounds=2, method="fedsparsify_global"), tmp_path).iloc[:-1]
    assert rows["alignment"].tolist() == pytest.approx([1.0, 1.0])
    assert rows["merging_gain"].tolist() == [0.0, 0.0]


def test_looking_changes_nothing(tmp_path, remembering):
    config = tiny_config(method=remembering, rounds=4, eval_every=2)
    rows = record_merging(config, tmp_path / "looked")
    run(config, results_dir=tmp_path / "run", progress=False)
    records = [read_run(tmp_path / name, config.run_id)[1]["provenance"] for name in ("looked", "run")]
    assert records[0]["state_sha256"] == records[1]["state_sha256"]
    assert rows["round"][rows["alignment"].notna()].tolist() == [0, 2]


@dataclass(frozen=True)
class Failing(FedAvg):
    """FedAvg, but client 0 never replies."""

    def reply(self, result, memory, t):
        if result.client == 0:
            raise RuntimeError("no reply")
        return super().reply(result, memory, t)


def test_a_skipped_client_is_not_looked_at(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "failing", Failing)
    rows = record_merging(tiny_config(method="failing", clients=3, on_client_failure="skip"), tmp_path)
    merged = (rows["members_accuracy"] + rows["merging_gain"]).iloc[:-1]
    assert merged.tolist() == pytest.approx(rows["accuracy"].iloc[1:].tolist(), abs=1e-12)


def record(folder, config, alignments):
    rows = pd.DataFrame({"round": range(len(alignments)), "alignment": alignments, "up_bytes": 0, "down_bytes": 0})
    save_table(folder, config.resolved(), rows.assign(members_accuracy=0.5, merging_gain=0.1), provenance={})


def test_a_claim_is_judged_by_the_last_ten_observed_rounds_paired_by_seed(tmp_path):
    queue = load_profile(ROOT / "params" / "merging" / "lite.yaml")
    for config in queue:
        if config.method in ("fedavg", "fedsparsify_global") and config.partition == "iid":
            late = 0.3 + config.seed / 100 + 0.2 * (config.method != "fedavg")
            record(tmp_path / "merging" / "lite", config, [9.0] * 10 + [math.nan] + [late] * 10 + [math.nan])
    found = per_run(recorded("merging/lite", tmp_path))
    assert found["alignment"].tolist() == pytest.approx([0.3, 0.31, 0.32, 0.5, 0.51, 0.52])
    claims = claims_table(tmp_path, ROOT / "params" / "claims.yaml")
    row = claims[claims["claim"].str.startswith("Easier merging")].iloc[0]
    assert row[["ours, n seeds", "verdict"]].tolist() == ["IID: +0.2000 ± 0.0000 (n=3)", "reproduced"]


def test_without_records_there_is_nothing_to_say(tmp_path):
    found = per_run(recorded("merging/lite", tmp_path))
    assert found.empty


def test_what_is_recorded_of_merging_are_the_runs_that_the_tables_show():
    main = profile_queue("lite")
    assert all(replace(config, eval_every=1) in main for config in load_profile(ROOT / "params/merging/lite.yaml"))


@pytest.mark.parametrize("name", ["quick", "paper"])
def test_queues_of_this_repository_are_valid(name):
    assert load_profile(ROOT / "params" / "merging" / f"{name}.yaml")
