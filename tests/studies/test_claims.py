"""Laws of verdicts: interval, side and threshold decide; partitions are counted; references are paired by seed."""

import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import yaml

from feddip_lite.core.flat import Layout
from feddip_lite.core.models import build_model
from feddip_lite.records.catalogue import profile_queue, rows_choosing_masks
from feddip_lite.records.names import NAMES, any_of
from feddip_lite.records.store import COLUMNS, ROOT, headline, save_run
from feddip_lite.report.statistics import summaries
from feddip_lite.studies.claims import RULES, claims_table, judged, measured, verdict

TIGHT, WIDE = np.array([0.10, 0.11, 0.12]), np.array([-0.1, 0.1, 0.3])
ROUNDS = 24


def runs(**accuracies):
    """A run per label and seed, of constant accuracy: `FedDIP=[0.8, 0.7]` are two seeds."""
    frames = []
    for label, values in accuracies.items():
        for seed, accuracy in enumerate(values):
            run = pd.DataFrame({"round": range(ROUNDS), "accuracy": accuracy, "loss": 1.0, "local_accuracy": np.nan})
            facts = {
                "up_bytes": 3,
                "down_bytes": 10 + seed,
                "mib": 1.0,
                "mask_interval": 5,
                "mask_overlap": 0.5,
                "regrown": 0,
            }
            facts["diverged"] = ""
            frames.append(run.assign(label=label, seed=seed, run_id=f"{label}{seed}", **facts))
    return pd.concat(frames)


def values_of(table, measure):
    return measured(summaries(table), measure)


@pytest.mark.parametrize(
    ("values", "side", "threshold", "expected"),
    [
        ([TIGHT], "above", 0.0, "reproduced"),
        ([TIGHT], "below", 0.0, "not reproduced"),
        ([WIDE], "above", 0.0, "not reproduced"),  # its interval has both sides
        ([TIGHT, WIDE], "above", 0.0, "partly"),
        ([TIGHT, TIGHT], "between", [0.0, 0.2], "reproduced"),
        ([TIGHT], "between", [0.0, 0.11], "not reproduced"),
        ([TIGHT, TIGHT[:2]], "above", 0.0, "no verdict for n < 3"),
    ],
)
def test_a_claim_holds_where_the_whole_interval_is_on_the_good_side(values, side, threshold, expected):
    assert verdict(values, side, threshold) == expected


def test_differences_are_paired_by_seed_and_go_to_the_best_reference_of_each_seed():
    table = runs(FedDIP=[0.8, 0.7, 0.9], SNIP=[0.5, 0.9, 0.1], FedDST=[0.6, 0.2, 0.3])
    measure = {"column": "accuracy", "of": "FedDIP", "to": ["SNIP", "FedDST"], "by": "difference"}
    assert np.allclose(values_of(table, measure), [0.8 - 0.6, 0.7 - 0.9, 0.9 - 0.3])
    assert np.allclose(values_of(table, {**measure, "to": ["SNIP"], "by": "ratio"}), [0.8 / 0.5, 0.7 / 0.9, 9.0])


def test_seeds_without_all_runs_do_not_count_and_an_absent_method_leaves_nothing():
    table = runs(FedDIP=[0.8, 0.7], FedAvg=[0.9])
    measure = {"column": "accuracy", "of": "FedDIP", "to": ["FedAvg"], "by": "difference"}
    assert len(values_of(table, measure)) == 1
    assert len(values_of(table, {**measure, "to": ["MPFL†"]})) == 0


def test_the_end_is_compared_with_the_best_ten_rounds_in_a_row():
    table = runs(FedDIP=[0.5])
    table.loc[table["round"].between(2, 11), "accuracy"] = 0.7
    assert values_of(table, {"column": "end_minus_best", "of": "FedDIP", "by": "value"}) == pytest.approx([0.5 - 0.7])


def test_overlap_is_the_mean_over_the_rounds_that_choose_a_mask_but_the_first():
    table = runs(FedDIP=[0.5])
    table["mask_overlap"] = np.where(table["round"] % 5 == 0, table["round"] / 100, 1.0)
    mean = np.mean([0.05, 0.10, 0.15, 0.20])
    assert values_of(table, {"column": "mask_overlap", "of": "FedDIP", "by": "value"}) == pytest.approx([mean])


@pytest.mark.parametrize("eval_every", [1, 2, 5, 7])
def test_a_row_chooses_a_mask_if_one_of_its_rounds_does(eval_every):
    table = runs(FedDIP=[0.5, 0.6], FedAvg=[0.7])
    table.loc[table["label"] == "FedAvg", "mask_interval"] = np.nan
    rare = table[(table["round"] % eval_every == eval_every - 1) | (table["round"] == ROUNDS - 1)]
    ends = rare.loc[rare["run_id"] == "FedDIP0", "round"].tolist()
    spans = zip([-1, *ends], ends, strict=False)
    expected = [end for start, end in spans if any(t % 5 == 0 for t in range(start + 1, end + 1))]
    chosen = rows_choosing_masks(rare)
    assert chosen.groupby("run_id")["round"].agg(list).to_dict() == {"FedDIP0": expected, "FedDIP1": expected}


def test_bytes_are_those_of_the_whole_run():
    table = runs(FedDIP=[0.5, 0.5])
    measure = {"column": "down_bytes", "of": "FedDIP", "by": "value"}
    assert values_of(table, measure).tolist() == headline(table)["down_bytes"].tolist() == [10 * ROUNDS, 11 * ROUNDS]


def test_without_results_nothing_is_claimed(tmp_path):
    table = claims_table(tmp_path)
    assert len(table) == len(yaml.safe_load(RULES.read_text())["claims"]) >= 10
    assert set(table["verdict"]) == {"not tested at this scale"} and set(table["setting"]) == {"-"}


def test_every_claim_names_known_methods_sources_and_an_existing_notebook():
    sources = {f"{config.model}_{config.dataset}" for config in profile_queue("lite")}
    sources |= {f"{config.model}_{config.dataset}_long" for config in profile_queue("long")}
    sources |= {"sweep", "across_seeds", "merging", "cost_cpu", "by_sparsity", "chosen", "equal_bytes", "second_order"}
    sources |= {"encrypted_cpu", "equal_bytes_long"}
    labels = {*NAMES.values(), "dense", "10% kept"}  # the last two: what is sent, in benchmarks/encrypted.py
    for claim in yaml.safe_load(RULES.read_text())["claims"]:
        measure = claim["measure"]
        assert {re.split(r" \(|, ", name)[0] for name in (*measure.get("to", []), *measure["of"])} <= labels
        assert set(measure["from"]) <= sources
        answers = any_of(claim.get("answer", []))
        assert len(answers) == len(measure["of"]) * ("question" in claim) and any(answers) == ("question" in claim)
        assert (ROOT / "notebooks" / f"{claim['notebook']}.ipynb").exists()


def test_each_method_and_each_setting_is_judged_in_a_row_of_its_own():
    table = runs(FedDIP=[0.8, 0.7, 0.9], FedAvg=[0.7, 0.6, 0.8], **{"FedDIP (repo)": [0.5, 0.4, 0.6]})
    table = table.assign(model="lenet5", dataset="fashionmnist", split="IID")
    said = judged(table, "lite")
    said = said[said["claim"].str.startswith("Extreme sparsity")]
    assert said["measured"].str.extract(": (.*),")[0].tolist() == ["FedDIP - FedAvg", "FedDIP (repo) - FedAvg"]
    assert said["ours, n seeds"].iloc[0] == "IID: +0.1000 ± 0.0000 (n=3)"
    assert said["verdict"].tolist() == ["reproduced", "not reproduced"]
    assert judged(table.assign(dataset="digits"), "lite").empty


def test_in_a_sweep_each_sparsity_stands_for_a_partition(tmp_path):
    (config, *_) = profile_queue("lite", model="lenet5", method="feddip", preset="paper", seed=0)
    for target, gain in ((0.9, 0.0), (0.99, 0.1)):
        for seed in (0, 1, 2):
            for method in ("feddp", "feddip"):
                run = replace(config, method=method, seed=seed, target_sparsity=target).resolved()
                accuracy = 0.5 + seed / 100 + gain * (method == "feddip")
                table = pd.DataFrame({name: [0] for name in COLUMNS}).assign(accuracy=accuracy, local_accuracy=np.nan)
                save_run(tmp_path / "lite", run, table, {}, [])
    table = claims_table(tmp_path)
    (row,) = table[table["claim"].str.contains("reachable")].to_dict("records")
    assert row["ours, n seeds"] == "s = 0.9: +0.0000 ± 0.0000 (n=3); s = 0.99: +0.1000 ± 0.0000 (n=3)"
    assert row["verdict"] == "partly"
    spoken = "the growing penalty is worth +0.0 ± 0.0 points (s = 0.9) and +10.0 ± 0.0 points (s = 0.99)"
    assert (row["question"], row["answer"]) == (4, spoken)
    rules = tmp_path / "claims.yaml"
    rules.write_text(RULES.read_text().replace('answer: "the growing penalty is worth"', 'answer: ""'))
    table = claims_table(tmp_path, rules)
    (silent,) = table[table["claim"].str.contains("reachable")].to_dict("records")
    assert silent == row | {"answer": ""}


def test_one_return_for_every_hundred_weights_is_counted_by_the_layout_of_lenet5():
    prunable = Layout.of(build_model("lenet5", classes=10, channels=1, size=28)).prunable
    (claim,) = (
        claim for claim in yaml.safe_load(RULES.read_text())["claims"] if claim["measure"]["column"] == "regrown"
    )
    assert str(prunable) in claim["claim"] and claim["good"]["threshold"] == round(prunable / 100)


def test_time_and_memory_are_judged_from_a_quiet_benchmark_and_never_from_a_rehearsal(tmp_path):
    def row_of(rehearsal, load=0.5):
        rows = [
            {"split": "LeNet-5", "label": label, "seed": turn, "seconds": seconds + turn / 100, "peak_mib": 40.0}
            for label, seconds in (("FedAvg", 2.0), ("FedDIP", 3.0))
            for turn in range(3)
        ]
        facts = {"rehearsal": rehearsal, "load": {"before": 0.1, "after": load}, "cpus": 2}
        record = {"clients": rows, "layers": [], "models": [], "times": [], "provenance": facts}
        (tmp_path / "benchmarks").mkdir(exist_ok=True)
        (tmp_path / "benchmarks" / "cost_cpu.json").write_text(json.dumps(record))
        return claims_table(tmp_path / "results").set_index("claim").loc["Faster training"]

    mean, quiet = np.mean([3 / 2, 3.01 / 2.01, 3.02 / 2.02]), row_of(False)
    assert quiet["ours, n seeds"].startswith(f"LeNet-5: {mean:.4f} ±") and quiet["verdict"] == "not reproduced"
    assert all(row["verdict"] == "not tested at this scale" for row in (row_of(True), row_of(False, load=2.1)))
