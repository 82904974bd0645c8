"""Laws of figures and names, on recorded runs of a tiny federation."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import FAST, tiny_config

from feddip_lite.methods import METHODS
from feddip_lite.records import catalogue as experiments
from feddip_lite.records.catalogue import comparable, main_runs, profile_queue, recorded
from feddip_lite.records.names import NAMES, describe, labels
from feddip_lite.records.store import headline, load_results
from feddip_lite.report import diagrams as drawings
from feddip_lite.report.curves import accuracy_curves, accuracy_for_bytes, column_panels, families
from feddip_lite.report.statistics import paired
from feddip_lite.report.style import COLOURS, save_figure
from feddip_lite.train.run import train

TWO = {**FAST, "rounds": 2}
QUEUE = [tiny_config(method=method, seed=seed, **TWO) for method in ("fedavg", "feddip") for seed in (0, 1, 2)]
QUEUE += [tiny_config(preset="repo", **TWO), tiny_config(partition="pathological", **TWO)]
QUEUE += [tiny_config(method_options={"upload": "masked"}, **TWO), tiny_config(penalty_max=0.5, mask_interval=1, **TWO)]


pytestmark = pytest.mark.usefixtures("agg")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`results/` of a small checkout: the profile `lite` has the runs of QUEUE."""
    root = tmp_path_factory.mktemp("checkout") / "results"
    train(QUEUE, root / "lite")
    return root


@pytest.fixture
def results(folder):
    return describe(load_results(folder / "lite"))


def only(results, *names, seeds=(0, 1, 2)):
    return results[results["label"].isin(names) & results["seed"].isin(seeds) & (results["split"] == "IID")]


# ---- figures


def test_saving_a_figure_twice_gives_the_same_bytes(results, tmp_path):
    figure, again = (accuracy_curves({"Tiny": only(results, "FedAvg")}) for _ in range(2))
    for name, drawn in (("first", figure), ("second", figure), ("third", again)):
        save_figure(drawn, "curves", tmp_path / name)
    for suffix in ("png", "svg"):
        saved = {(tmp_path / name / f"curves.{suffix}").read_bytes() for name in ("first", "second", "third")}
        assert len(saved) == 1


def test_saved_figures_hold_neither_date_nor_software(tmp_path):
    png, svg = (path.read_bytes() for path in save_figure(drawings.workflow(), "workflow", tmp_path))
    assert b"Software" not in png and b"matplotlib" not in png.lower()
    assert b"<dc:date>" not in svg and b"Matplotlib v" not in svg


def test_an_interval_is_drawn_for_three_seeds_and_never_for_two(results):
    three = accuracy_curves({"Tiny": only(results, "FedAvg")}, x=["round"]).axes[0]
    two = accuracy_curves({"Tiny": only(results, "FedAvg", seeds=(0, 1))}, x=["round"]).axes[0]
    assert (len(three.lines), len(three.collections)) == (1, 1)
    assert (len(two.lines), len(two.collections)) == (2, 0)


def test_legends_carry_n_and_titles_carry_data_and_rounds(results):
    figure = accuracy_curves({"Tiny": only(results, "FedAvg", "FedDIP")})
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert texts == ["FedAvg (n = 3)", "FedDIP (n = 3)"]
    assert "digits, LeNet-5, T = 2 rounds" in figure.get_suptitle()


def test_curves_against_bytes_end_at_the_total_of_the_run(results):
    run = only(results, "FedDIP", seeds=(0,))
    line = accuracy_curves({"Tiny": run}, x=["mib"]).axes[0].lines[0]
    assert line.get_xdata()[-1] * 2**20 == pytest.approx((run["up_bytes"] + run["down_bytes"]).sum())
    assert line.get_ydata()[-1] == run["accuracy"].iloc[-1]


def test_each_seed_is_drawn_against_its_own_bytes(results):
    runs = only(results, "FedAvg", seeds=(0, 1))
    runs = runs.assign(mib=runs["mib"].where(runs["seed"] == 0, 3 * runs["mib"]))
    lines = accuracy_curves({"Tiny": runs}, x=["mib"]).axes[0].lines
    totals = runs.groupby("seed")["mib"].max().tolist()
    assert [line.get_xdata()[-1] for line in lines] == totals and totals[1] == pytest.approx(3 * totals[0])


def test_each_source_has_columns_of_its_own(results):
    iid = only(results, "FedAvg")
    figure = accuracy_curves({"Fresh": iid, "Recorded": iid, "Empty": iid.iloc[:0]}, x=["round"])
    assert [axes.get_title("left").split("\n")[0] for axes in figure.axes] == ["Fresh", "Recorded"]


def test_column_panels_leave_out_rounds_without_a_value(results):
    figure = column_panels(only(results, "FedAvg", "FedDIP"), ["sparsity", "pruning_error"], "Tiny")
    assert [len(axes.lines) for axes in figure.axes] == [2, 1]


def test_families_put_each_method_in_its_row_beside_fedavg_and_feddip(results):
    figure = families(results[results["split"] == "IID"], "Tiny", x=["round"])
    rows = [[text.get_text().split(" (n")[0] for text in axes.get_legend().get_texts()] for axes in figure.axes]
    assert rows == [["FedAvg", "FedDIP", "FedDIP (mask_interval = 1, penalty_max = 0.5)"]] * 3


def test_points_lie_at_final_accuracy_and_total_bytes_with_an_interval_from_three_seeds_on(results):
    axes = accuracy_for_bytes(only(results, "FedAvg", "FedDIP"), "Tiny").axes[0]
    drawn = {bar.get_label(): bar.has_yerr for bar in axes.containers}
    assert drawn == {"FedAvg (n = 3)": True, "FedDIP (n = 3)": True}
    one = only(results, "FedDIP", seeds=(0,))
    (bar,) = accuracy_for_bytes(one, "Tiny").axes[0].containers
    assert not bar.has_yerr
    assert np.allclose(bar.lines[0].get_xydata(), headline(one)[["mib", "accuracy"]].to_numpy())


def test_only_seeds_that_every_method_has_are_compared(results):
    assert set(comparable(only(results, "FedAvg", "FedDIP"))["seed"]) == {0, 1, 2}
    assert set(comparable(only(results, "FedAvg", "FedDIP (repo)"))["seed"]) == {0}
    assert comparable(results.iloc[:0]).empty


def test_every_method_has_a_name_and_a_colour_of_its_own():
    assert set(METHODS) <= set(NAMES) and set(METHODS) <= set(COLOURS)
    assert len(set(COLOURS.values())) == len(COLOURS)


def test_drawing_leaves_the_style_of_matplotlib_alone():
    before = dict(plt.rcParams)
    drawings.schedules(20, 0.5, 0.9, 1e-3, 20)
    drawings.before_after_pruning()
    assert dict(plt.rcParams) == before


def test_a_pruned_entry_of_a_matrix_is_left_blank():
    mask = np.eye(3, dtype=bool)
    image = drawings.matrices({"m": (np.ones((3, 3)), mask)}).axes[0].images[0].get_array()
    assert np.array_equal(~image.mask, mask)


# ---- names


def test_labels_name_preset_and_changed_options(results):
    assert labels(results) == [
        "FedAvg",
        "FedDIP",
        "FedDIP (mask_interval = 1, penalty_max = 0.5)",
        "FedDIP (repo)",
        "FedDIP (upload = masked)",
    ]


def test_runs_with_another_decay_have_another_setting(results):
    first = results[results["run_id"] == results["run_id"].iloc[0]].drop(columns=list(experiments.ADDED))
    usual, other = (describe(first.assign(lr_decay=decay))["setting"].iloc[0] for decay in (0.998 ** (1000 / 2), 0.5))
    assert other == f"{usual}, lr decay 0.5"


def test_nothing_recorded_is_an_empty_frame_with_the_same_columns(results, monkeypatch, tmp_path):
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    empty = recorded("lite", dataset="digits")
    assert len(empty) == 0
    assert set(empty.columns) >= {"label", "split", "setting", "mib", "seed", "run_id", "method"}


def test_main_runs_leave_ablations_out(folder, monkeypatch):
    monkeypatch.setattr(experiments, "ROOT", folder.parent)
    monkeypatch.setattr(experiments, "profile_queue", lambda profile: QUEUE)
    forms = ["FedAvg", "FedDIP", "FedDIP (repo)", "FedDIP (upload = masked)"]
    assert labels(main_runs("lite")["lenet5_digits"]) == forms


def test_an_unknown_profile_is_refused_by_name():
    with pytest.raises(ValueError, match="PROFILE: 'smoke' is not valid; expected one of quick, lite, paper"):
        profile_queue("smoke")


def test_every_profile_loads_and_shortened_runs_keep_the_learning_rate_at_the_end():
    for profile in experiments.PROFILES:
        for config in profile_queue(profile):
            assert config.lr_decay == pytest.approx(0.998 ** (1000 / config.rounds))


# ---- comparisons


def test_two_runs_of_one_method_and_seed_are_never_averaged(results):
    runs = headline(only(results, "FedAvg", "FedDIP"))
    twice = pd.concat([runs, runs[(runs["label"] == "FedDIP") & (runs["seed"] == 1)]])
    with pytest.raises(ValueError, match="FedDIP: two runs under seed 1; compare runs of one setting"):
        paired(twice, "FedDIP", "FedAvg")
    both = pd.concat([only(results, "FedAvg"), only(results, "FedAvg").assign(run_id="x")])
    with pytest.raises(ValueError, match="duplicate"):
        accuracy_curves({"Tiny": both})
