"""Laws of `python -m feddip_lite`: what a run writes, and one line with exit status 2 for bad input."""

import json
import math
import subprocess
import sys
from dataclasses import asdict

import pytest
from conftest import FAST, environment, flags, names, read_outputs, record_files, tiny_config

from feddip_lite.__main__ import main
from feddip_lite.config import FIELDS
from feddip_lite.core.sparsity import num_kept
from feddip_lite.methods import METHODS
from feddip_lite.methods.registry import options_of, settings_of
from feddip_lite.records.profiles import load_profile
from feddip_lite.records.store import COLUMNS, read_run
from feddip_lite.train.evaluate import evaluate_state

LARGE = "1" + "0" * 400  # an integer that no float can hold

WRONG = [
    (["--method=fedvag"], "method: 'fedvag'", ", ".join(METHODS) + " (did you mean fedavg?)"),
    (["--method=7"], "method: 7", "one of fedavg"),
    (["--method=null"], "method: None", "one of fedavg"),
    (["--dataset=mnist"], "dataset: 'mnist'", "one of digits, fashionmnist, cifar10, cifar100"),
    (["--model=lenet"], "model: 'lenet'", "one of lenet5, alexnet, resnet18 (did you mean lenet5?)"),
    (["--width=0"], "width: 0", "a number in (0, 8]"),
    (["--width=8.1"], "width: 8.1", "a number in (0, 8]"),
    (["--width=wide"], "width: 'wide'", "a number in (0, 8]"),
    (["--dense-layers=all"], "dense_layers: 'all'", "one of none, first, last, both"),
    (["--rounds=0"], "rounds: 0", "an integer >= 1"),
    (["--rounds=2.5"], "rounds: 2.5", "an integer >= 1"),
    (["--rounds=1e3"], "rounds: 1000.0", "an integer >= 1"),
    (["--rounds=true"], "rounds: True", "an integer >= 1"),
    (["--rounds="], "rounds: ''", "an integer >= 1"),
    (["--clients=-3"], "clients: -3", "an integer >= 1"),
    (["--clients=1438"], "clients: 1438", "an integer in [1, 1437]"),
    (["--clients-per-round=7"], "clients_per_round: 7", "an integer in [1, 6] (clients)"),
    (["--clients-per-round=0"], "clients_per_round: 0", "an integer >= 1"),
    (["--local-epochs=0"], "local_epochs: 0", "an integer >= 1"),
    (["--batch-size=0"], "batch_size: 0", "an integer >= 1"),
    (["--batch-size=[32]"], "batch_size: [32]", "an integer >= 1"),
    (["--lr=0"], "lr: 0", "a number in (0, inf)"),
    (["--lr=-0.1"], "lr: -0.1", "a number in (0, inf)"),
    (["--lr=NaN"], "lr: nan", "a number in (0, inf)"),
    (["--lr=Infinity"], "lr: inf", "a number in (0, inf)"),
    (["--lr=1e999"], "lr: inf", "a number in (0, inf)"),
    ([f"--lr={LARGE}"], "lr: 1000", "a number in (0, inf)"),
    (["--lr-decay=1.01"], "lr_decay: 1.01", "a number in (0, 1]"),
    (["--lr-decay=0"], "lr_decay: 0", "a number in (0, 1]"),
    (["--lr-schedule=cosine"], "lr_schedule: 'cosine'", "one of exponential, theory"),
    (["--lr-schedule=theory"], "smoothness: None", "a number in (0, inf) with 'theory'"),
    (["--smoothness=2"], "smoothness: 2.0", "none otherwise"),
    (["--smoothness=0", "--lr-schedule=theory"], "smoothness: 0", "a number in (0, inf)"),
    (["--weight-decay=-1e-4"], "weight_decay: -0.0001", "a number in [0, inf)"),
    (["--initial-sparsity=1"], "initial_sparsity: 1", "a number in [0, 1)"),
    (["--initial-sparsity=0.95"], "initial_sparsity: 0.95", "[0, 0.9] (target_sparsity)"),
    (["--target-sparsity=1"], "target_sparsity: 1", "a number in [0, 1)"),
    (["--target-sparsity=90%"], "target_sparsity: '90%'", "a number in [0, 1)"),
    (["--mask-interval=0"], "mask_interval: 0", "an integer >= 1"),
    (["--mask-interval=5", "--method=fedavg"], "mask_interval: 5", "none, since fedavg has none"),
    (["--penalty-max=-1"], "penalty_max: -1", "a number in [0, inf)"),
    (["--penalty-max=1e-3", "--method=feddp"], "penalty_max: 0.001", "none, since feddp has none"),
    (["--penalty-steps=0"], "penalty_steps: 0", "an integer >= 1"),
    (["--partition=iiid"], "partition: 'iiid'", "one of iid, pathological, dirichlet (did you mean iid?)"),
    (["--classes-per-client=0"], "classes_per_client: 0", "an integer >= 1"),
    (["--classes-per-client=1", "--partition=pathological"], "classes_per_client", "classes_per_client=1"),
    (["--classes-per-client=11", "--partition=pathological"], "classes_per_client: 11", "[1, 10]"),
    (["--classes-dealt=ordered"], "classes_dealt: 'ordered'", "one of drawn, in_order"),
    (["--alpha=0"], "alpha: 0", "a number in (0, inf)"),
    (["--validation=1"], "validation: 1", "a number in [0, 1)"),
    (["--validation=0.001"], "validation: 0.001", "class 0 has"),
    (["--alpha=1e7", "--partition=dirichlet"], "alpha: 10000000.0", "a number in (0, 1e6]"),
    (["--seed=-1"], "seed: -1", "an integer in [0, 9223372036854775807]"),
    (["--seed=9223372036854775808"], "seed: 9223372036854775808", "an integer in [0, 9223372036854775807]"),
    (["--preset=code"], "preset: 'code'", "one of paper, repo, memory"),
    (["--preset=repo", "--method=fedavg"], "preset: 'repo'", "one of paper"),
    (["--method-options=[1]"], "method_options: [1]", "a mapping of option names to values"),
    (['--method-options={"upload": '], "method_options: ", "a mapping of option names to values"),
    (['--method-options={"uplaod": "masked"}'], "unknown name 'uplaod'", "(did you mean upload?); known: erk"),
    (['--method-options={"upload": "sparse"}'], "upload: 'sparse'", "one of dense, masked, screened"),
    (['--method-options={"server_memory": 1}'], "server_memory: 1", "true or false"),
    (['--method-options={"upload": "masked"}', "--preset=memory"], "upload: 'masked'", "'dense'"),
    (['--method-options={"mu": -1}', "--method=fedprox"], "mu: -1", "a number in [0, inf)"),
    (["--eval-every=0"], "eval_every: 0", "an integer >= 1"),
    (["--final-prune=maybe"], "final_prune: 'maybe'", "true or false"),
    (["--down=gzip"], "down: 'gzip'", "expected fp32, fp16, qsgd:BITS:BLOCK (2 to 16 bits, a block of at least 1)"),
    (["--down=qsgd:8:0"], "down: 'qsgd:8:0'", "a block of at least 1"),
    (["--up=qsgd:17"], "up: 'qsgd:17'", "2 to 16 bits"),
    (["--up=topk:0"], "up: 'topk:0'", "topk:SHARE in (0, 1]"),
    (["--up=8"], "up: 8", "qsgd:BITS:BLOCK"),
    (["--up-pruned=ternary:0"], "up_pruned: 'ternary:0'", "or none (that of up)"),
    (["--mask-cache=maybe"], "mask_cache: 'maybe'", "true or false"),
    (["--up-feedback=ef22"], "up_feedback: 'ef22'", "one of none, ef, ef21"),
    (["--up-feedback=ef"], "up_feedback: 'ef'", "with up = 'fp32'; expected none"),
    (["--up-feedback=ef", "--up=qsgd:2"], "up_feedback: 'ef'", "expected none, more bits, or smaller blocks"),
    (["--precision=fp16"], "precision: 'fp16'", "one of float32, tf32, bf16"),
    (["--precision=tf32", "--device=cpu"], "precision: 'tf32'", "float32 or bf16"),
    (["--on-client-failure=retry"], "on_client_failure: 'retry'", "one of abort, skip"),
    (["--client-timeout=0"], "client_timeout: 0", "a number in (0, inf)"),
    (["--device=gpu"], "device: 'gpu'", "auto, cpu, cuda or cuda:N"),
    (["--device=cuda:77"], "device: 'cuda:77'", "expected"),
    (["--workers=0"], "workers: 0", "auto, together or an integer >= 1"),
    (["--workers=many"], "workers: 'many'", "auto, together or an integer >= 1"),
    (["--checkpoint-every=0"], "--checkpoint-every: 0", "an integer >= 1"),
    (["--checkpoint-every=often"], "--checkpoint-every: 'often'", "an integer >= 1"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "fault", "allowed"), WRONG, ids=[" ".join(case[0])[:60] for case in WRONG])
def test_wrong_value_gives_one_line_with_field_value_and_range(tmp_path, capsys, arguments, fault, allowed):
    results = tmp_path / "results"
    assert main(["run", *flags(), f"--results={results}", *arguments]) == 2
    out, err = read_outputs(capsys)
    assert (out, len(err)) == ([], 1)
    assert fault in err[0]
    assert allowed in err[0]
    assert not results.exists()


def test_every_field_with_a_range_has_a_wrong_value_in_the_table():
    tried = {flag.split("=")[0].removeprefix("--").replace("-", "_") for case in WRONG for flag in case[0]}
    assert tried >= FIELDS


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "run | sweep | methods | export | doctor"),
        (["rum"], "rum"),
        (["run", "--mehtod=fedavg"], "unknown name '--mehtod' (did you mean --method?)"),
        (["run", "--learning-rate", "0.1"], "unknown name '--learning-rate' (did you mean --lr?)"),
        (["run", "--gpu"], "unknown name '--gpu' (did you mean --device?)"),
        (["run", "--mu=1"], "--mu belongs to a method; expected --method-options mu=VALUE"),
        (["run", "--dataset=CIFAR-10"], "(did you mean cifar10?)"),
        (["run", "--method=SNIP"], "(did you mean snip?)"),
        (["run", "--zzzz=1"], "unknown name '--zzzz'; known: --method"),
        (["run", "--method=fedprox", "--method-options=mu=-1"], "mu: -1 is not valid; expected a number in [0, inf)"),
        (["run", "--method-options=uplaod=masked"], "unknown name 'uplaod' (did you mean upload?)"),
        (["methods", "FedDip"], "(did you mean feddip?)"),
        (["export", "nothing", "--to", "x.onnx"], "nothing.json: no such run"),
        (["export", "nothing"], "--to"),
        (["run", "--round=5"], "unknown name '--round' (did you mean --rounds?)"),
        (["run", "fedavg"], "unknown name 'fedavg'"),
        (["run", "--rounds"], "--rounds"),
        (["sweep"], "profile"),
        (["sweep", "nowhere.yaml"], "nowhere.yaml"),
        (["sweep", "x.yaml", "--time-limit=-1"], "--time-limit: -1 is not valid; expected a number in (0, inf)"),
        (["sweep", "x.yaml", "--time-limit=nan"], "--time-limit: 'nan'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_command_line_gives_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = read_outputs(capsys)
    assert (out, len(err)) == ([], 1)
    assert words in err[0]
    assert list(tmp_path.iterdir()) == []


def test_missing_data_says_what_to_do(tmp_path, monkeypatch, capsys):
    (tmp_path / "cifar10.npz").write_bytes(b"not an archive")
    monkeypatch.setenv("FEDDIP_DATA", str(tmp_path))
    assert main(["run", *flags(dataset="cifar10", model="alexnet"), f"--results={tmp_path / 'results'}"]) == 2
    out, err = read_outputs(capsys)
    assert len(err) == 1
    assert "cifar10.npz" in err[0]
    assert not (tmp_path / "results").exists()


def test_run_writes_the_documented_columns_and_circumstances(tmp_path, capsys):
    config = tiny_config(**FAST)
    assert main(["run", *flags(**FAST), f"--results={tmp_path}", "--quiet"]) == 0
    out, err = read_outputs(capsys)
    assert err == []
    assert len(out) == 1
    assert str(tmp_path / config.run_id) in out[0]
    assert names(tmp_path) == record_files(config.run_id)
    assert (tmp_path / f"{config.run_id}.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    record = json.loads((tmp_path / f"{config.run_id}.json").read_text())
    assert record["run_id"] == config.run_id
    assert record["config"] == asdict(config.resolved())
    circumstances = "package commit torch device threads precision data split_sha256 wall_seconds".split()
    assert set(record["provenance"]) >= set(circumstances)
    assert set(record["provenance"]["data"]) == {"source", "variant", "sha256", "classes", "image_shape"}
    assert {"last", "mean_last_10", "best_accuracy"} == set(record["final"])


def test_second_call_computes_nothing_and_leaves_files_byte_identical(tmp_path, monkeypatch, capsys):
    def contents():
        return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.glob("feddip_*")}

    arguments = ["run", *flags(**FAST), f"--results={tmp_path}", "--quiet"]
    assert main(arguments) == 0
    first = contents(), read_outputs(capsys)
    assert len(first[0]) == 4
    monkeypatch.setattr("feddip_lite.train.run.prepare", None)  # whoever computes, fails
    assert main(arguments) == 0
    assert (contents(), read_outputs(capsys)) == first


def test_progress_line_goes_to_stderr_and_quiet_silences_it(tmp_path, capsys):
    main(["run", *flags(**FAST), f"--results={tmp_path}"])
    out, err = read_outputs(capsys)
    assert len(out) == 1
    assert "3/3" in "".join(err)


def test_failing_run_gives_one_line_and_status_1(tmp_path, capsys):
    assert main(["run", *flags(lr=1e4, local_epochs=3), f"--results={tmp_path}", "--quiet"]) in (1, 2)
    _, err = read_outputs(capsys)
    assert len(err) == 1
    assert "round " in err[0]
    assert not [name for name in names(tmp_path) if name.endswith((".part", ".checkpoint", ".mask"))]


def test_module_runs_from_any_folder_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "feddip_lite", "run", "--rounds=0"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "python -m feddip_lite: rounds: 0 is not valid; expected an integer >= 1\n"
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_results_can_be_read_back_by_run_id(tmp_path):
    main(["run", *flags(**FAST), f"--results={tmp_path}", "--quiet"])
    history, record = read_run(tmp_path, tiny_config(**FAST).run_id)
    assert len(history) == 3
    assert record["final"]["last"]["accuracy"] == history["accuracy"].iloc[-1]


def test_values_are_read_by_one_rule_here_and_in_profiles(tmp_path, monkeypatch):
    asked = []

    def run(config, **rest):
        asked.append(config)
        raise ValueError("enough")

    monkeypatch.setattr("feddip_lite.__main__.run", run)
    values = {"lr": "1e-1", "weight-decay": ".5", "smoothness": "none", "width": "1.", "method": "feddp"}
    options = {"JSON": '{"erk": "none", "upload": "masked"}', "pairs": "erk=none, upload=masked"}
    for text in options.values():
        given = [f"--{name}={value}" for name, value in values.items()]
        assert main(["run", *given, f"--method-options={text}"]) == 2
    lines = "".join(f", {name.replace('-', '_')}: {value}" for name, value in values.items())
    path = tmp_path / "profile.yaml"
    path.write_text(f"queue: [{{method_options: {{erk: none, upload: masked}}{lines}}}]")
    asked += load_profile(path)
    assert len({config.run_id for config in asked}) == 1
    (config, *_) = asked
    assert (config.lr, config.weight_decay, config.smoothness, config.width) == (0.1, 0.5, None, 1.0)
    assert config.method_options == {"erk": "none", "upload": "masked"}


def test_methods_are_listed_and_each_of_their_options_with_value_range_and_source(capsys):
    assert main(["methods"]) == 0
    out, _ = read_outputs(capsys)
    assert [line.split()[0] for line in out] == list(METHODS)
    for name in METHODS:
        assert main(["methods", name]) == 0
        out, _ = read_outputs(capsys)
        listed = {line.split(" = ")[0].strip(): line for line in out[1:] if " = " in line}
        assert list(listed) == list(options_of(name))
        for option, item in options_of(name).items():
            assert f"{option} = {settings_of(name, 'paper')[option]}" in listed[option]
            assert ("check" not in item.metadata) or item.metadata["check"].expected in listed[option]


def test_a_run_that_stays_below_its_target_or_steps_once_an_epoch_says_so_and_a_final_prune_reaches_it(
    tmp_path, capsys
):
    few = {"rounds": 9, "clients": 60, "clients_per_round": 2, "mask_interval": 5}
    assert main(["run", *flags(**few), f"--results={tmp_path}"]) == 0
    _, err = read_outputs(capsys)
    notes = [line for line in err if ": note: " in line]
    assert "batch_size: 32, and no client has more than 24 training samples: an epoch is one step" in notes[0]
    assert "target_sparsity: 0.9, and the run ended at 0.8" in notes[1] and "masks change every 5 rounds" in notes[1]
    assert len(notes) == 2
    assert main(["run", *flags(**few), "--final-prune=true", f"--results={tmp_path}"]) == 0
    assert "target_sparsity" not in " ".join(read_outputs(capsys)[1])
    config = tiny_config(**few, final_prune=True)
    history, record = read_run(tmp_path, config.run_id)
    prunable = sum(math.prod(layer["shape"]) for layer in record["layers"])
    kept = sum(layer["kept"] for layer in record["layers"])
    assert kept == num_kept(0.9, prunable) and history["sparsity"].iloc[-1] == 1 - kept / prunable
    usual, _ = read_run(tmp_path, tiny_config(**few).run_id)
    assert history["accuracy"].tolist()[:-1] == usual["accuracy"].tolist()[:-1]


def test_export_writes_a_recorded_runs_model(tmp_path, capsys):
    assert main(["run", *flags(**FAST), f"--results={tmp_path}", "--quiet"]) == 0
    run_id = tiny_config(**FAST).run_id
    for suffix in ("onnx", "pt2", "safetensors"):
        assert main(["export", run_id, f"--results={tmp_path}", f"--to={tmp_path}/out.{suffix}"]) == 0
        size = (tmp_path / f"out.{suffix}").stat().st_size
        assert read_outputs(capsys)[0][-1] == f"{tmp_path}/out.{suffix}: {size} bytes"


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["run", *flags(**FAST), "--results=~/results", "--quiet"]) == 0
    assert names(tmp_path / "results") == record_files(tiny_config(**FAST).run_id)


@pytest.mark.parametrize("rounds", [0, 2])
def test_an_interrupted_run_says_what_is_left_of_it(tmp_path, monkeypatch, capsys, rounds):
    count = 0

    def interrupt(*arguments):
        nonlocal count
        count += 1
        if count > rounds:
            raise KeyboardInterrupt
        return evaluate_state(*arguments)

    monkeypatch.setattr("feddip_lite.train.run.evaluate_state", interrupt)
    arguments = ["run", *flags(**FAST, rounds=4), f"--results={tmp_path}", "--quiet", "--checkpoint-every=1"]
    assert main(arguments) == 130
    left = f"goes on from the checkpoint after {rounds} of 4 rounds" if rounds else "begins again: no checkpoint yet"
    assert read_outputs(capsys)[1] == [f"python -m feddip_lite: interrupted; the same command {left}"]


@pytest.mark.usefixtures("forgetting")
def test_a_plugin_registers_models_and_data_for_the_command_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine_to_plug.py").write_text(
        "import torch, feddip_lite\n"
        "images, labels = torch.randint(0, 256, (80, 1, 12, 12), dtype=torch.uint8), torch.arange(80) % 4\n"
        "feddip_lite.register_dataset('mine', lambda: (images[:60], labels[:60], images[60:], labels[60:]))\n"
        "make = lambda classes: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(144, classes))\n"
        "feddip_lite.register_model('flat', make)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("FEDDIP_PLUGINS", "")
    results = f"--results={tmp_path / 'results'}"
    own = ["--dataset=mine", "--model=flat", "--rounds=2", "--clients=3", "--clients-per-round=2", results]
    assert main(["run", *own]) == 2
    assert "dataset: 'mine' is not valid" in read_outputs(capsys)[1][0]
    assert main(["run", "--plugin=mine_to_plug", "--quiet", *own]) == 0
    (run_id,) = {path.stem for path in (tmp_path / "results").glob("*.json")}
    assert main(["export", run_id, results, "--plugin=mine_to_plug", f"--to={tmp_path / 'm.onnx'}"]) == 0
    read_outputs(capsys)
    assert main(["run", "--plugin=nowhere", *own]) == 2
    assert "plugin 'nowhere': ModuleNotFoundError" in read_outputs(capsys)[1][0]
