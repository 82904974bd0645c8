"""Laws of the configuration: what a run id depends on, what None becomes, and what is refused."""

from dataclasses import MISSING, fields, replace

import pytest

from feddip_lite import Config
from feddip_lite.config import FIELDS
from feddip_lite.methods import METHODS
from feddip_lite.methods.fedavg import FedAvg

DESIGN = {
    "method": "feddip", "dataset": "digits", "model": "lenet5", "width": 1.0, "dense_layers": "none",
    "rounds": 1000, "clients": 50,
    "clients_per_round": 5, "local_epochs": 5, "batch_size": 128, "lr": 0.1, "lr_decay": 0.998,
    "lr_schedule": "exponential", "smoothness": None, "weight_decay": 5e-4, "initial_sparsity": None,
    "target_sparsity": 0.9, "mask_interval": None, "penalty_max": None, "penalty_steps": 20, "partition": "iid",
    "classes_per_client": 2, "classes_dealt": "drawn", "alpha": 0.5, "validation": 0.0, "seed": 0, "preset": "paper",
    "method_options": {}, "final_prune": False, "down": "fp32", "up": "fp32", "up_pruned": None, "up_feedback": "none",
    "mask_cache": False,
    "eval_every": 1, "precision": "float32", "on_client_failure": "abort", "client_timeout": None,
    "device": "auto", "workers": "auto",
}  # fmt: skip
"""Fields and defaults of the public interface: scripts and stored results rely on them."""

OTHER = {
    "method": "feddp", "dataset": "cifar10", "model": "alexnet", "width": 0.5, "dense_layers": "last",
    "rounds": 999, "clients": 49,
    "clients_per_round": 4, "local_epochs": 4, "batch_size": 127, "lr": 0.2, "lr_decay": 0.997,
    "lr_schedule": "theory", "smoothness": 3.0, "weight_decay": 4e-4, "initial_sparsity": 0.4, "target_sparsity": 0.8,
    "mask_interval": 4, "penalty_max": 2e-3, "penalty_steps": 19, "partition": "dirichlet", "classes_per_client": 3,
    "classes_dealt": "in_order", "alpha": 0.4, "validation": 0.1, "seed": 1, "preset": "repo",
    "method_options": {"upload": "masked"}, "final_prune": True, "down": "fp16", "up": "qsgd:8:512",
    "up_pruned": "ternary:512", "up_feedback": "ef", "mask_cache": True,
    "eval_every": 2, "precision": "bf16", "on_client_failure": "skip", "client_timeout": 1.0,
    "device": "cpu", "workers": 2,
}  # fmt: skip
"""For every field a value that is not its default."""

UNHASHED = {"device", "workers", "client_timeout"}


def changed(name):
    if name in ("lr_schedule", "smoothness"):  # valid together only
        return Config(lr_schedule="theory", smoothness=2.0 if name == "lr_schedule" else OTHER["smoothness"])
    if name == "up_feedback":  # of what loses nothing there is none
        return Config(up="topk:0.01", up_feedback=OTHER[name])
    return Config(**{name: OTHER[name]})


def test_fields_and_defaults_are_those_of_the_public_interface():
    defaults = {f.name: f.default_factory() if f.default is MISSING else f.default for f in fields(Config)}
    assert defaults == DESIGN


@pytest.mark.parametrize(
    ("settings", "run_id"),
    [
        ({}, "feddip_digits_857a6e5e130e"),
        ({"method": "fedavg", "dataset": "fashionmnist", "rounds": 200, "lr_decay": 0.990039920079968, "seed": 2},
         "fedavg_fashionmnist_5954244f42ff"),
        ({"method": "feddp", "dataset": "cifar10", "model": "alexnet", "preset": "repo", "partition": "pathological",
          "method_options": {"upload": "masked"}}, "feddp_cifar10_c5981c409e29"),
    ],
)  # fmt: skip
def test_run_id_is_pinned(settings, run_id):
    assert Config(**settings).run_id == run_id  # a change would orphan every recorded result


@pytest.mark.parametrize("name", sorted(UNHASHED))
def test_run_id_does_not_depend_on_where_and_how_fast_it_runs(name):
    assert changed(name).run_id == Config().run_id


@pytest.mark.parametrize("name", sorted(FIELDS - UNHASHED))
def test_run_id_depends_on_every_field_that_changes_the_run(name):
    assert changed(name).run_id != Config().run_id


def test_run_ids_of_single_changes_are_all_different():
    assert len({changed(name).run_id for name in FIELDS - UNHASHED}) == len(FIELDS - UNHASHED)


@pytest.mark.parametrize(
    ("short", "long"), [("qsgd", "qsgd:8:512"), ("qsgd:4", "qsgd:4:512"), ("topk:1e-2", "topk:0.01")]
)
def test_run_id_does_not_depend_on_how_a_codec_is_written(short, long):
    assert Config(up=short).up == long
    assert Config(up=short).run_id == Config(up=long).run_id != Config(down=long).run_id


def test_feedback_that_could_not_work_is_refused():
    with pytest.raises(ValueError, match="up_feedback: 'ef' is not valid with up = 'fp32'; expected none"):
        Config(up_feedback="ef")
    with pytest.raises(
        ValueError, match="up_pruned = 'ternary:512', which may lose 21.6 times the squares it is given"
    ):
        Config(up="qsgd", up_pruned="ternary", up_feedback="ef21")


@pytest.mark.parametrize("value", ["shared", "none"])
def test_run_id_depends_on_method_options(value):
    assert Config(method_options={"erk": value}).run_id != Config().run_id


@pytest.mark.parametrize(
    "settings",
    [{"penalty_max": 1e-3}, {"initial_sparsity": 0.5, "mask_interval": 5}, {"method_options": {"upload": "dense"}},
     {"lr": 0.1, "seed": 0}, {"width": 1}, {"method": "feddip", "preset": "paper"}],
    ids=str,
)  # fmt: skip
def test_run_id_does_not_depend_on_spelling_defaults_out(settings):
    assert Config(**settings).run_id == Config().run_id


def test_run_id_of_a_preset_does_not_depend_on_spelling_its_options_out():
    dense = {"bn_statistics": "dense"}
    assert Config(preset="repo", method_options=dense).run_id == Config(preset="repo").run_id
    assert Config(method_options=dense).run_id != Config(preset="repo").run_id


@pytest.mark.parametrize("method", METHODS)
def test_resolving_is_idempotent_and_keeps_the_run_id(method):
    config = Config(method=method)
    assert config.resolved().resolved() == config.resolved()
    assert config.resolved().run_id == config.run_id


def test_resolved_fills_none_with_the_methods_own_values():
    config = Config().resolved()
    assert (config.initial_sparsity, config.mask_interval, config.penalty_max) == (0.5, 5, 1e-3)
    assert config.method_options == {
        "erk": "per_client", "erk_over": "weights", "mask_source": "dense_average", "server_memory": False,
        "upload": "dense", "lambda_schedule": "eq3", "norm": "plain", "bn_statistics": "masked", "test_leak": False,
        "normalisation": "correct", "shortcuts": "dense", "feedback": "within_round", "reentry": "memory",
    }  # fmt: skip
    assert Config(method="fedprox").resolved().method_options == {"mu": 0.01}
    assert Config(method="feddp").resolved().penalty_max is None  # it has none


def test_presets_flip_the_documented_options():
    repo, memory = (Config(preset=preset).resolved().method_options for preset in ("repo", "memory"))
    paper = Config().resolved().method_options
    assert {key: value for key, value in repo.items() if value != paper[key]} == {
        "mask_source": "masked_average", "lambda_schedule": "repo", "bn_statistics": "dense",
        "test_leak": True, "normalisation": "published",
    }  # fmt: skip
    assert {key: value for key, value in memory.items() if value != paper[key]} == {"server_memory": True}


def test_initial_sparsity_of_its_own_never_exceeds_the_target():
    assert Config(target_sparsity=0.3).resolved().initial_sparsity == 0.3
    assert Config(target_sparsity=0.3, initial_sparsity=0.2).resolved().initial_sparsity == 0.2


def test_values_are_stored_in_one_canonical_type():
    config = Config(lr=1, width=2, seed=True + 1, client_timeout=5)
    assert [type(value) for value in (config.lr, config.width, config.client_timeout)] == [float] * 3
    assert config == Config(lr=1.0, width=2.0, seed=2, client_timeout=5.0)


def test_options_of_the_caller_are_copied():
    options = {"upload": "masked"}
    config = Config(method_options=options)
    options["upload"] = "nonsense"
    assert config.method_options == {"upload": "masked"}


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("penalty_maximum", "penalty_max"), ("epochs", "local_epochs"), ("Lr", "lr"), ("sed", "seed")],
)
def test_unknown_key_names_the_nearest_known_one(key, nearest):
    with pytest.raises(ValueError, match=rf"unknown name '{key}' \(did you mean {nearest}\?\); known: method, dataset"):
        Config.from_dict({"rounds": 5, key: 1})


def test_unknown_method_option_names_the_nearest_known_one():
    with pytest.raises(ValueError, match=r"method_options of feddip: unknown name 'uplaod' \(did you mean upload\?\)"):
        Config(method_options={"uplaod": "masked"})


def test_method_added_to_the_table_is_known_from_then_on(monkeypatch):
    with pytest.raises(ValueError, match="method: 'mine' is not valid"):
        Config(method="mine")
    monkeypatch.setitem(METHODS, "mine", FedAvg)
    assert Config(method="mine").run_id.startswith("mine_digits_")


@pytest.mark.parametrize(("method", "preset"), [("fedavg", "repo"), ("fedprox", "memory")])
def test_preset_that_a_method_does_not_have_is_refused(method, preset):
    reason = rf"preset: '{preset}' is not valid; expected one of paper \(method {method}\)"
    with pytest.raises(ValueError, match=reason):
        Config(method=method, preset=preset)


@pytest.mark.parametrize(
    ("method", "name"), [("fedavg", "mask_interval"), ("fedavg", "initial_sparsity"), ("feddp", "penalty_max")]
)
def test_setting_that_a_method_does_not_have_is_refused(method, name):
    with pytest.raises(ValueError, match=f"{name}: .* is not valid; expected none, since {method} has none"):
        Config(method=method, **{name: OTHER[name]})


def test_replacing_a_field_checks_it_again():
    with pytest.raises(ValueError, match="rounds: 0 is not valid"):
        replace(Config(), rounds=0)
