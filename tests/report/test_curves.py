"""Laws of figures and names, on recorded runs of a tiny federation."""

from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import FAST, tiny_config
from matplotlib.collections import PolyCollection

from feddip_lite.methods import METHODS, Method
from feddip_lite.methods.base import About
from feddip_lite.records import catalogue
from feddip_lite.records.catalogue import comparable, main_runs, profile_queue, recorded
from feddip_lite.records.names import describe, labels, title_of, told_apart
from feddip_lite.records.store import headline, load_results
from feddip_lite.report import diagrams
from feddip_lite.report.curves import accuracy_curves, accuracy_for_bytes
from feddip_lite.report.statistics import interval, paired
from feddip_lite.report.style import look_of, save_figure
from feddip_lite.report.tables import results_table
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


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_saving_a_figure_twice_gives_the_same_bytes(results, tmp_path):
    figure, again = (accuracy_curves(only(results, "FedAvg")) for _ in range(2))
    for name, drawn in (("first", figure), ("second", figure), ("third", again)):
        save_figure(drawn, "curves", tmp_path / name)
    for suffix in ("png", "svg"):
        saved = {(tmp_path / name / f"curves.{suffix}").read_bytes() for name in ("first", "second", "third")}
        assert len(saved) == 1


def test_saved_figures_hold_neither_date_nor_software(tmp_path):
    png, svg = (path.read_bytes() for path in save_figure(diagrams.workflow(), "workflow", tmp_path))
    assert b"Software" not in png and b"matplotlib" not in png.lower()
    assert b"<dc:date>" not in svg and b"Matplotlib v" not in svg


def bands(panel):
    return [part for part in panel.collections if isinstance(part, PolyCollection)]


def test_every_seed_is_a_line_and_from_three_on_their_mean_is_one_too(results):
    three, two = (accuracy_curves(only(results, "FedAvg", seeds=seeds)).axes[0] for seeds in ((0, 1, 2), (0, 1)))
    values = only(results, "FedAvg").pivot(index="round", columns="seed", values="accuracy")
    assert [len(two.lines), len(three.lines)] == [2, 4]
    thick, *thin = sorted(three.lines, key=lambda line: -line.get_linewidth())
    np.testing.assert_allclose(thick.get_ydata(), values.mean(axis=1))
    np.testing.assert_array_equal([line.get_ydata() for line in thin], values.T)


def test_differences_to_the_reference_are_paired_by_seed_and_have_an_interval_from_three_seeds_on(results):
    def below(seeds):
        figure = accuracy_curves(only(results, "FedAvg", "FedDIP", seeds=seeds))
        assert [axes.get_ylabel() for axes in figure.axes] == ["test accuracy", "minus FedAvg's, same seed"]
        return figure.axes[1]

    runs = only(results, "FedAvg", "FedDIP")
    own, other = (
        runs[runs["label"] == name].pivot(index="round", columns="seed", values="accuracy")
        for name in ("FedDIP", "FedAvg")
    )
    difference = own - other
    zero = below((0, 1, 2)).lines[-1]
    assert set(zero.get_ydata()) == {0}
    np.testing.assert_allclose(below((0, 1, 2)).lines[0].get_ydata(), difference.mean(axis=1), atol=1e-15)
    np.testing.assert_allclose([line.get_ydata() for line in below((0, 1)).lines[:2]], difference[[0, 1]].T, atol=1e-15)
    assert [len(bands(below(seeds))) for seeds in ((0, 1, 2), (0, 1))] == [1, 0]
    (band,) = bands(below((0, 1, 2)))
    heights = band.get_paths()[0].vertices[:, 1]
    mean, half = interval(difference.iloc[-1])
    assert mean - half in heights and mean + half in heights


def test_legends_carry_n_and_titles_carry_data_and_rounds(results):
    figure = accuracy_curves(only(results, "FedAvg", "FedDIP"), "Tiny")
    assert legend_of(figure) == ["FedAvg (n = 3)", "FedDIP (n = 3)"]
    assert figure.get_suptitle().startswith("Tiny: digits, LeNet-5, T = 2 rounds")


def test_what_has_no_value_has_no_panel(results):
    figure = accuracy_curves(results[results["label"] == "FedDIP"])
    assert [axes.get_title("left") for axes in figure.axes] == ["IID", "2 classes per client"]
    figure = accuracy_curves(results[results["label"].isin(["FedDIP", "FedAvg"])])  # FedAvg ran on one of them
    assert [axes.get_visible() for axes in figure.axes] == [True, True, True, False]


def test_lines_are_the_means_of_up_to_ten_rows_and_their_axis_is_where_they_live(results):
    run, rounds = only(results, "FedAvg", seeds=(0,)).iloc[:1], 60
    rising = pd.concat([run.assign(round=t, accuracy=0.9 - 0.8 * 0.9**t) for t in range(rounds)])
    panel = accuracy_curves(rising).axes[0]
    smooth = rising["accuracy"].rolling(10, min_periods=1).mean()
    np.testing.assert_allclose(panel.lines[0].get_ydata(), smooth)
    low, high = panel.get_ylim()
    assert smooth.iloc[rounds // 5] > low > smooth.iloc[rounds // 10] and high > smooth.max()
    assert all(tick == int(tick) for tick in panel.get_xticks())


def test_lines_on_each_other_have_their_markers_apart(results):
    runs = only(results, "FedAvg", "FedDIP", seeds=(0,)).drop_duplicates("run_id")
    panel = accuracy_curves(pd.concat([runs.assign(round=t, accuracy=0.5) for t in range(40)])).axes[0]
    one, other = panel.lines
    assert one.get_color() != other.get_color()
    assert np.array_equal(one.get_xydata(), other.get_xydata())
    places = panel.collections[0].get_offsets()[:, 0]
    assert len(set(places)) == len(places) == 16


def test_points_lie_at_final_accuracy_and_total_bytes_with_an_interval_from_three_seeds_on(results):
    axes = accuracy_for_bytes(only(results, "FedAvg", "FedDIP"), "Tiny").axes[0]
    drawn = {bar.get_label(): bar.has_yerr for bar in axes.containers}
    assert drawn == {"FedAvg": True, "FedDIP": True}
    finals = headline(only(results, "FedAvg", "FedDIP"))
    places = {bar.get_label(): bar.lines[0].get_ydata().item() for bar in axes.containers}
    assert places == {"FedAvg": 0, "FedDIP": pytest.approx(paired(finals, "FedDIP", "FedAvg").mean())}
    one = only(results, "FedDIP", seeds=(0,))
    (bar,) = accuracy_for_bytes(one, "Tiny").axes[0].containers
    assert not bar.has_yerr
    assert np.allclose(bar.lines[0].get_xydata(), headline(one)[["mib", "accuracy"]].to_numpy())


def test_points_are_named_beside_them_and_names_cover_neither_points_nor_names(results):
    runs = pd.concat([only(results, "FedAvg", "FedDIP", seeds=(0,)), only(results, "FedDIP (repo)")])
    figure = accuracy_for_bytes(runs.assign(accuracy=0.5), "Tiny")
    (panel,) = figure.axes
    assert {text.get_text() for text in panel.texts} == {"FedAvg", "FedDIP", "FedDIP (repo)"}
    figure.draw_without_rendering()
    places = panel.transData.transform([line.get_xydata()[0] for bar in panel.containers for line in bar.lines[:1]])
    boxes = [text.get_window_extent() for text in panel.texts]
    assert not any(box.contains(*place) for box in boxes for place in places)
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_only_seeds_that_every_method_has_are_compared(results):
    assert set(comparable(only(results, "FedAvg", "FedDIP"))["seed"]) == {0, 1, 2}
    assert set(comparable(only(results, "FedAvg", "FedDIP (repo)"))["seed"]) == {0}
    assert comparable(results.iloc[:0]).empty


def look_of_method(name):
    look = look_of(pd.DataFrame({"method": [name], "preset": ["paper"], "changed": [""]}))
    return look["color"], look["marker"]


def test_every_method_has_a_name_and_a_look_of_its_own_also_one_of_your_own(monkeypatch):
    class NewMethod(Method):
        about = About(title="New Method", family="dense to nothing")

    class Other(METHODS["feddip"]):
        pass

    known = {name: look_of_method(name) for name in METHODS}
    monkeypatch.setitem(METHODS, "new", NewMethod)
    monkeypatch.setitem(METHODS, "other", Other)
    looks = {name: look_of_method(name) for name in [*METHODS, "nobody"]}
    assert len(set(looks.values())) == len(looks)
    assert {name: looks[name] for name in known} == known
    assert [title_of(name) for name in ("new", "other", "nobody")] == ["New Method", "Other", "nobody"]
    assert len({title_of(name) for name in METHODS}) == len(METHODS)


def test_runs_of_a_method_that_is_not_registered_are_named_and_drawn(folder):
    records = load_results(folder / "lite")
    runs = describe(records.assign(method=records["method"].replace("fedavg", "elsewhere")))
    assert labels(runs)[-1] == "elsewhere" and "FedAvg" not in labels(runs)
    assert "elsewhere (n = 3)" in legend_of(accuracy_curves(runs[runs["split"] == "IID"]))


def test_drawing_leaves_the_style_of_matplotlib_alone():
    before = dict(plt.rcParams)
    diagrams.workflow()
    diagrams.before_after_pruning()
    assert dict(plt.rcParams) == before


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_a_pruned_entry_of_a_matrix_is_left_blank(kind):
    mask = np.eye(3, dtype=bool)
    image = diagrams.matrices({"m": (kind(np.ones((3, 3))), kind(mask))}).axes[0].collections[0].get_array()
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
    first = results[results["run_id"] == results["run_id"].iloc[0]].drop(columns=list(catalogue.ADDED))
    usual, other = (describe(first.assign(lr_decay=decay))["setting"].iloc[0] for decay in (0.998 ** (1000 / 2), 0.5))
    assert other == f"{usual}, lr decay 0.5"


def test_nothing_recorded_is_an_empty_frame_with_the_same_columns(results, monkeypatch, tmp_path):
    monkeypatch.setattr(catalogue, "ROOT", tmp_path)
    empty = recorded("lite", dataset="digits")
    assert len(empty) == 0
    assert set(empty.columns) >= {"label", "split", "setting", "mib", "seed", "run_id", "method"}


def test_main_runs_leave_ablations_out(results, monkeypatch):
    plain = results[results["label"] == "FedAvg"].drop(columns=list(catalogue.ADDED))
    strays = ({"method": "prunetrain", "preset": "repo"}, {"partition": "pathological", "classes_dealt": "in_order"})
    others = [describe(plain.assign(run_id=plain["run_id"] + "x", **stray)) for stray in strays]
    monkeypatch.setattr(catalogue, "recorded", lambda profile, folder: pd.concat([results, *others]))
    monkeypatch.setattr(catalogue, "profile_queue", lambda profile: QUEUE)
    runs = main_runs("lite")["lenet5_digits"]
    assert labels(runs) == ["FedAvg", "FedDIP", "FedDIP (repo)", "FedDIP (upload = masked)"]
    assert set(runs["split"]) == {"IID", "2 classes per client"}


def test_an_unknown_profile_is_refused_by_name():
    with pytest.raises(ValueError, match="PROFILE: 'smoke' is not valid; expected one of quick, lite, paper"):
        profile_queue("smoke")


def test_every_profile_loads_and_shortened_runs_keep_the_learning_rate_at_the_end():
    for profile in catalogue.PROFILES:
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
        accuracy_curves(both)


def test_settings_that_differ_between_runs_are_said_in_labels_and_only_what_all_share_in_the_title(results):
    usual, other = only(results, "FedAvg"), only(results, "FedDIP")
    faster = describe(other.drop(columns=["label", "split", "setting", "changed", "mib"]).assign(initial_lr=0.2))
    mixed = pd.concat([usual, faster])
    figure = accuracy_curves(mixed)
    usual_lr = usual["initial_lr"].iloc[0]
    name = "FedDIP (initial lr 0.2)"
    assert f"{name} (n = 3)" in legend_of(figure)
    assert "initial lr" not in figure.get_suptitle()
    assert name in results_table(mixed)["method (preset)"].tolist()
    twice = pd.concat([other, faster.assign(run_id=faster["run_id"] + "x")])
    lines = accuracy_curves(twice)
    assert len(legend_of(lines)) == 2 and f"{name} (n = 3)" in legend_of(lines)
    assert usual_lr != 0.2
    alike = told_apart(usual)
    assert alike.equals(usual)
    assert told_apart(
        pd.concat([usual, results[results["preset"] == "repo"].assign(setting=usual["setting"].iloc[0] + ", x")])
    )["label"].unique().tolist() == ["FedAvg", "FedDIP (repo; x)"]
