"""Laws of sweeps: a queue of runs in order, skipping what is done, within a time limit; wrong profiles."""

import json

import pytest
import yaml
from conftest import FAST, TINY, flags, names, read_outputs, record_files, tiny_config

from feddip_lite.__main__ import main
from feddip_lite.methods.registry import METHODS, settings_of
from feddip_lite.records.profiles import load_profile
from feddip_lite.records.store import ROOT


def profile(tmp_path, text=None):
    path = tmp_path / "tiny.yaml"
    defaults = json.dumps({**TINY, **FAST})  # JSON is YAML
    path.write_text(text or f"defaults: {defaults}\nqueue:\n  - {{method: [fedavg, feddip], seed: [0, 1]}}\n")
    return str(path)


def sweep(tmp_path, *extra, text=None):
    return main(["sweep", profile(tmp_path, text), f"--results={tmp_path / 'results'}", "--quiet", *extra])


def test_entry_stands_for_every_combination_of_its_lists_the_last_varying_fastest(tmp_path):
    text = "defaults: {rounds: 7}\nqueue:\n  - {method: [fedavg, feddp], lr: 0.2, seed: [3, 1]}\n  - {rounds: 9}\n"
    configs = load_profile(profile(tmp_path, text))
    assert [(c.method, c.lr, c.seed, c.rounds) for c in configs] == [
        ("fedavg", 0.2, 3, 7), ("fedavg", 0.2, 1, 7), ("feddp", 0.2, 3, 7), ("feddp", 0.2, 1, 7), ("feddip", 0.1, 0, 9),
    ]  # fmt: skip


def test_run_that_occurs_twice_is_kept_at_its_first_place(tmp_path):
    configs = load_profile(profile(tmp_path, "queue:\n  - {seed: [2, 1]}\n  - {seed: [1, 2, 3], lr: 0.1}\n"))
    assert [config.seed for config in configs] == [2, 1, 3]


@pytest.mark.parametrize("name", ["quick", "lite", "paper"])
def test_profiles_of_this_repository_are_valid(name):
    assert len(load_profile(ROOT / "params" / f"{name}.yaml")) > 1


def test_sweep_runs_its_queue_in_order_and_skips_what_is_done(tmp_path, capsys):
    order = [tiny_config(method=method, seed=seed, **FAST).run_id for method in ("fedavg", "feddip") for seed in (0, 1)]
    assert main(["run", *flags(method="feddip", **FAST), f"--results={tmp_path / 'results'}", "--quiet"]) == 0
    done = (tmp_path / "results" / f"{order[2]}.csv").stat().st_mtime_ns
    read_outputs(capsys)
    assert sweep(tmp_path) == 0
    out, err = read_outputs(capsys)
    assert err == []
    assert [line.split()[1].rstrip(":") for line in out] == order
    assert names(tmp_path / "results") == record_files(*order)
    assert (tmp_path / "results" / f"{order[2]}.csv").stat().st_mtime_ns == done


def test_sweep_out_of_time_stops_with_status_0_and_goes_on_next_time(tmp_path, capsys):
    assert sweep(tmp_path, "--time-limit=1e-9") == 0
    out, err = read_outputs(capsys)
    assert err == []
    assert out[-1].startswith("time limit reached; 4 of 4 runs left")
    assert not list((tmp_path / "results").glob("*.csv"))
    assert sweep(tmp_path) == 0
    assert len(list((tmp_path / "results").glob("*.json"))) == 4


def test_sweep_out_of_time_starts_no_further_run(tmp_path, capsys):
    text = f"defaults: {json.dumps({**TINY, **FAST, 'rounds': 1})}\nqueue:\n  - {{seed: [0, 1, 2, 3]}}\n"
    assert sweep(tmp_path, "--time-limit=1e-9", text=text) == 0
    assert "time limit reached" in read_outputs(capsys)[0][-1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("queue: [", "not valid YAML"),
        ("- 1\n", "expected a mapping with a list `queue`"),
        ("defaults: {}\n", "expected a mapping with a list `queue`"),
        ("queue: {method: fedavg}\n", "expected a mapping with a list `queue`"),
        ("queue: []\nquue: []\n", "unknown name 'quue' (did you mean queue?)"),
        ("queue:\n  - {}\n  - {rounds: 0}\n", "entry 2: rounds: 0 is not valid; expected an integer >= 1"),
        ("queue:\n  - {mehtod: fedavg}\n", "entry 1: config: unknown name 'mehtod' (did you mean method?)"),
        ("queue:\n  - {seed: [0, one]}\n", "entry 1: seed: 'one' is not valid"),
        ("queue:\n  - 5\n", "entry 1"),
        ("queue:\n  -\n", "entry 1"),
        ("defaults: 5\nqueue:\n  - {}\n", "entry 1"),
    ],
)
def test_wrong_profile_gives_one_line_naming_file_and_entry(tmp_path, capsys, text, words):
    assert sweep(tmp_path, text=text) == 2
    out, err = read_outputs(capsys)
    assert (out, len(err)) == ([], 1)
    assert "tiny.yaml" in err[0]
    assert words in err[0]
    assert not (tmp_path / "results").exists()


def test_profile_that_is_not_text_is_refused_by_name(tmp_path, capsys):
    (tmp_path / "binary.yaml").write_bytes(b"queue: \xff\xfe")
    assert main(["sweep", str(tmp_path / "binary.yaml"), f"--results={tmp_path / 'results'}"]) == 2
    assert "binary.yaml: not valid" in read_outputs(capsys)[1][0]


def test_every_setting_of_every_method_has_its_value_and_its_source():
    """`params/methods.yaml` says what the code holds: all of `paper`, and what each other preset changes."""
    documented = yaml.safe_load((ROOT / "params" / "methods.yaml").read_text())
    assert list(documented) == list(METHODS)
    for name, method in METHODS.items():
        assert list(documented[name]) == list(method.presets)
        values = {preset: {key: value for key, (value, _) in own.items()} for preset, own in documented[name].items()}
        assert values.pop("paper") == settings_of(name, "paper")
        assert values == {preset: dict(changed) for preset, changed in method.presets.items() if preset != "paper"}
        assert all(source.strip() for own in documented[name].values() for _, source in own.values())
