"""Laws of the questions that compare recorded runs: which are compared, and what the words and figures say."""

import json
import math
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest

from feddip_lite import Config
from feddip_lite.core.schedules import penalty_at
from feddip_lite.records.names import describe, label_of
from feddip_lite.report import curves
from feddip_lite.report.statistics import summaries
from feddip_lite.studies import chosen, equal_bytes, recipes, start
from feddip_lite.studies.departures import departures_table
from feddip_lite.studies.ingredients import (
    FEEDBACK,
    PENALTIES,
    REENTRY,
    by_sparsity,
    crossed,
    ingredients,
)

pytestmark = pytest.mark.usefixtures("agg")
ROUNDS = 20
MEAN = sum(penalty_at(t, 1e-3, 20, ROUNDS) for t in range(ROUNDS)) / ROUNDS


def recorded_runs(*runs):
    """Described runs of these (changes of the configuration, columns of the history)."""
    frames = []
    for changes, columns in runs:
        config = Config(**{"dataset": "fashionmnist", "rounds": ROUNDS, **changes}).resolved()
        facts = asdict(config) | {"initial_lr": config.lr, "method_options": json.dumps(config.method_options)}
        rows = {"round": range(config.rounds), "accuracy": 0.5, "loss": 1.0, "local_accuracy": math.nan}
        rows |= {"sparsity": 0.9, "up_bytes": 2**19, "down_bytes": 2**19, "diverged": "", "mask_overlap": 1.0}
        rows |= {"regrown": 0, "returned": 0, **columns}
        frames.append(pd.DataFrame(rows).assign(run_id=config.run_id, **{**facts, "lr": config.lr}))
    return describe(pd.concat(frames, ignore_index=True))


def test_every_cell_of_feedback_by_penalty_and_every_reentry_has_its_runs():
    constant = {"penalty_max": MEAN}
    feedbacks = ({"method_options": {"feedback": "none"}}, {}, {"preset": "memory"})
    cells = {}
    for fed_back, own in zip(FEEDBACK, feedbacks, strict=True):
        options = own.get("method_options", {})
        cells[fed_back, "none"] = {**own, "method": "feddp"}
        cells[fed_back, "growing"] = own
        cells[fed_back, "constant"] = {**own, **constant, "method_options": {**options, "lambda_schedule": "constant"}}
    again = {begins: {"preset": "memory", "method_options": {"reentry": begins}} for begins in REENTRY[2:]}
    strays = [
        {"penalty_max": 0.01},
        {"mask_interval": 1},
        {"preset": "repo"},
        {"weight_decay": 0.0},
        {"method": "fedavg"},
    ]
    strays += [{"method_options": {"lambda_schedule": "constant"}}, {"method_options": {"erk": "none"}}]
    strays += [{"target_sparsity": 0.8}, {"target_sparsity": 0.8, "method": "feddp"}]  # no feedback varied there
    runs = [(each, {}) for each in (*cells.values(), *again.values(), *strays)]
    found = ingredients(recorded_runs(*runs))
    named = found[found["begins"].isin(REENTRY[:2])]
    assert sorted(zip(named["fed_back"], named["penalised"], strict=True)) == sorted(cells)
    assert len(found) == len(cells) + len(again)
    assert sorted(found["begins"].unique()) == sorted(REENTRY)
    assert set(found["penalised"]) == set(PENALTIES)
    crossed(found, "title")


def test_target_sparsities_and_partitions_are_told_apart_and_other_settings_left_out():
    runs = [({"target_sparsity": s, "partition": p}, {}) for s in (0.9, 0.98) for p in ("iid", "pathological")]
    others = [({"rounds": 7}, {}), ({"validation": 0.1}, {}), ({"lr": 0.3}, {}), ({"width": 0.5}, {})]
    found = by_sparsity(recorded_runs(*runs, *others))
    where = ["s = 0.9", "s = 0.98", "s = 0.9, 2 classes per client", "s = 0.98, 2 classes per client"]
    assert found["split"].tolist() == where


@pytest.mark.parametrize("every", [1, 5])
def test_a_returned_weight_stays_as_long_as_the_rows_say(every):
    kept = np.where(np.arange(ROUNDS) >= 5, 3, 0)  # three weights return in round 5 and stay
    rows = {"round": range(every - 1, ROUNDS, every)}
    rows |= {"returned": kept[every - 1 :: every], "regrown": np.where(kept[every - 1 :: every], 3, 0)}
    rows["regrown"][np.argmax(rows["regrown"] > 0) + 1 :] = 0
    config = Config(dataset="fashionmnist", rounds=ROUNDS)
    run = recorded_runs(({}, {})).iloc[every - 1 :: every].assign(**rows)
    found = summaries(run).loc[config.run_id]
    assert (found["regrown"], found["stay_rounds"]) == (3, 15)
    older = summaries(run.drop(columns="returned")).loc[config.run_id]
    assert math.isnan(older["stay_rounds"])


def test_a_dip_is_what_the_last_ten_rounds_lose_where_they_choose_a_mask():
    choose = np.arange(ROUNDS) % 5 == 0
    accuracy = np.where(choose, 0.5, 0.8)
    accuracy[:10] = 0.1  # not of the last ten
    run = recorded_runs(({}, {"accuracy": accuracy}))
    (found,) = summaries(run)["dip_at_choice"]
    assert found == pytest.approx(-0.3)
    share = choose[10:].mean()
    (final,) = summaries(run)["accuracy"]
    assert final == pytest.approx(0.8 + share * found)  # what the dips cost the final accuracy
    assert math.isnan(*summaries(run[choose])["dip_at_choice"])  # evaluated nowhere else
    assert math.isnan(*summaries(run.assign(diverged="in round 19"))["dip_at_choice"])


def test_the_best_on_held_out_samples_is_what_is_tested():
    grid = {0.001: 0.6, 0.003: 0.8, 0.01: 0.7}
    held = [({"penalty_max": peak, "validation": 0.1}, {"accuracy": value}) for peak, value in grid.items()]
    tested = [({"penalty_max": peak, "seed": seed}, {"accuracy": 0.1}) for peak in grid for seed in (0, 1)]
    alone = [({"method": "feddp", "validation": 0.1}, {}), ({"method": "feddp"}, {})]  # one value: nothing to choose
    results = recorded_runs(*held, *tested, *alone)
    found = chosen.chosen(results, "penalty_max")
    assert found["penalty_max"].unique().tolist() == [0.003]
    assert found["label"].tolist() == ["FedDIP, chosen penalty"] * 2
    (row,) = chosen.candidates_table(results, "penalty_max").to_dict("records")
    assert row["chosen penalty"] == "0.003" and row["0.01"] == "0.7000"
    assert chosen.chosen(results, "initial_lr").empty


def test_strengths_stand_side_by_side(agg):
    held = [({"penalty_max": peak, "validation": 0.1}, {"accuracy": 0.5 + peak}) for peak in (0.001, 0.01)]
    decays = [({"method": "feddp", "weight_decay": d, "validation": 0.1}, {"accuracy": d}) for d in (5e-4, 6e-4, 1e-3)]
    rates = [({"method": each, "lr": 0.3, "validation": 0.1}, {"accuracy": 0.9}) for each in ("feddp", "feddip")]
    figure = chosen.strengths(recorded_runs(*held, *decays, *rates, ({}, {})), "title")
    (panel,) = figure.axes
    assert [text.get_text() for text in panel.get_xticklabels()] == ["0", "0.001", "0.01"]
    drawn = {tuple(round(y, 6) for y in line.get_ydata()) for line in panel.lines}
    assert {(0.0005, 0.501, 0.51), (0.0005, 0.0006, 0.001)} <= drawn


def test_fedavg_is_stopped_at_feddips_bytes_and_other_dense_forms_are_told_by_what_they_change():
    rising = {"accuracy": np.arange(ROUNDS) / 100}
    cheap = {"up_bytes": 2**18, "down_bytes": 2**18}  # half of FedAvg's
    usual = recorded_runs(({"method": "fedavg"}, rising), ({}, {**cheap, "accuracy": 0.3}))
    others = [{"rounds": 12, "lr_decay": 0.9}, {"width": 0.5}, {"width": 0.5, "lr": 0.3}, {"validation": 0.1}]
    results = pd.concat([usual, recorded_runs(*(({"method": "fedavg", **each}, {}) for each in others))])
    found = equal_bytes.equal_bytes(results, usual).set_index("label")
    assert sorted(found.index) == sorted(equal_bytes.FORMS)
    assert found.loc[equal_bytes.STOPPED, "accuracy"] == pytest.approx(np.mean(np.arange(10)) / 100)
    assert found.loc[equal_bytes.SHORTER, "rounds"] == 12 and found.loc[equal_bytes.NARROWER, "width"] == 0.5
    spent = found.loc["FedDIP", "mib"]
    assert (found.loc["FedAvg", "mib"], found.loc[equal_bytes.STOPPED, "mib"]) == (2 * spent, spent)
    equal_bytes.for_equal_bytes(found.reset_index(), "title")


def test_each_start_is_named_by_what_round_0_sees():
    masks = [({"method_options": {"erk": erk}}, {}) for erk in start.STARTS]
    others = [({"method": "fedavg"}, {}), ({"method": "fedsparsify_global"}, {}), ({"method": "snip"}, {})]
    strays = [({"target_sparsity": s}, {}) for s in (0.8, 0.98)]  # as many of FedDIP as at 0.9, but one start alone
    strays += [({"penalty_max": 0.01}, {}), ({"preset": "memory"}, {})]
    runs = recorded_runs(*masks, ({"initial_sparsity": 0.0}, {}), *others, *strays)
    found = start.starts(runs)
    assert sorted(found["start"]) == sorted([*start.STARTS.values(), start.UNPRUNED, *start.OTHERS])
    start.by_start({"LeNet-5": found}, "title")


def test_departures_are_variants_minus_the_usual_form_and_both_ways_to_deal_classes():
    in_order = {"partition": "pathological", "classes_dealt": "in_order"}
    one_client = {"method_options": {"scored_by": "client"}}
    means = [
        ({"method": "snip"}, 0.5),
        ({"method": "snip", **one_client}, 0.25),
        ({"method": "snip", **one_client, "partition": "pathological"}, 0.9),  # stands alone: no difference
        ({"method": "feddst"}, 0.4),
        ({"method": "feddst", "preset": "repo"}, 0.7),
        ({"method": "fedlp", "method_options": {"variant": "hetero"}}, 0.1),  # a form of its own
        ({"method": "feddst", "up": "qsgd:8:512", "down": "qsgd:8:512"}, 0.3),  # sent otherwise, not computed otherwise
        ({"method": "fedavg"}, 0.8),
        ({}, 0.75),
        ({"preset": "repo"}, 0.3),
        ({"method": "fedavg", "partition": "pathological"}, 0.8),
        ({"partition": "pathological"}, 0.7),
        ({"method": "fedavg", **in_order}, 0.6),
        (in_order, 0.4),
    ]
    runs = [({**own, "seed": seed}, {"accuracy": mean}) for own, mean in means for seed in (0, 1, 2)]
    table = departures_table(recorded_runs(*runs))
    assert [tuple(row) for row in table.to_numpy()] == [
        ("FedDST (repo)", "FedDST", "IID", "+0.3000 ± 0.0000 (n=3)"),
        ("SNIP (scored_by = client)", "SNIP", "IID", "-0.2500 ± 0.0000 (n=3)"),
        ("FedDIP", "FedAvg", "2 classes per client", "-0.1000 ± 0.0000 (n=3)"),
        ("FedDIP", "FedAvg", "2 classes per client, in order", "-0.2000 ± 0.0000 (n=3)"),
    ]
    assert departures_table(recorded_runs(*runs[:3])).empty


def test_the_advice_for_a_budget_is_the_most_accurate_form_within_it_and_fedavg_stopped_there():
    def costing(share, accuracy):  # of FedAvg's 2**20 bytes a round
        return {"accuracy": accuracy, "up_bytes": round(share * 2**20), "down_bytes": 0}

    rising = {**costing(1.0, 0), "accuracy": [t / ROUNDS for t in range(ROUNDS)]}
    x4 = recipes.RECIPES["FedDIP X4"]
    own = {"up": x4.up, "down": x4.down, "method_options": {"upload": "masked", "mask_source": "masked_average"}}
    three = [
        ({"method": "fedavg"}, rising),
        ({}, costing(0.6, 0.9)),
        ({"method": "snip"}, costing(0.095, 0.3)),
        ({"method": "feddst"}, costing(0.09, 0.2)),
    ]
    usual = recorded_runs(*(({**run, "seed": seed}, columns) for run, columns in three for seed in (0, 1, 2)))
    coded = [({**own, "seed": seed}, costing(0.06, 0.8)) for seed in (0, 1, 2)]
    assert set(recipes.forms(pd.concat([usual, recorded_runs(*coded[:2])]), usual)["label"]) == set(usual["label"])
    runs = recipes.forms(pd.concat([usual, recorded_runs(*coded)]), usual)
    assert set(runs["label"]) == {*usual["label"], "FedDIP X4"}
    curves.accuracy_for_bytes(runs, "title")
    few = curves.accuracy_for_bytes(runs, "title", {"FedDIP X4", "SNIP"})
    assert {text.get_text() for panel in few.axes for text in panel.texts} == {"FedDIP X4", "SNIP"}
    assert recipes.advice_table(usual[usual["method"] == "fedavg"]).empty
    table = recipes.advice_table(runs).set_index("at most")
    assert table["most accurate"].to_dict() == {
        "5%": "none (FedDIP X4)", "10%": "FedDIP X4", "20%": "FedDIP X4", "35%": "FedDIP X4", "65%": "FedDIP",
    }  # fmt: skip
    end = np.mean(rising["accuracy"][-10:])
    assert table.loc["10%", "accuracy minus FedAvg's"] == f"{0.8 - end:+.4f} ± 0.0000 (n=3)"
    assert table.loc["10%", "of FedAvg's bytes"] == "0.060"
    stopped = np.mean(rising["accuracy"][: ROUNDS // 5])
    assert table.loc["20%", "FedAvg, stopped there"] == f"{stopped - end:+.4f} ± 0.0000 (n=3)"
    later = recipes.advice_table(usual).set_index("at most")["most accurate"]
    assert later.to_dict() == {"5%": "none (FedDST)", "10%": "SNIP", "20%": "SNIP", "35%": "SNIP", "65%": "FedDIP"}
    assert recipes.losses(usual[usual["label"] == "FedAvg"], 1.0) == [0.0, 0.0, 0.0]


def test_a_configurations_label_is_that_of_its_record():
    for config in recipes.RECIPES.values():
        changes = {name: value for name, value in asdict(config).items() if value != getattr(Config(), name)}
        assert recorded_runs((changes, {}))["label"].unique().tolist() == [label_of(config)]
