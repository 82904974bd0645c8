"""Laws of `python -m feddip_lite`: what a run writes, and one line with exit status 2 for bad input."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest
from conftest import FAST, environment, flags, names, read_outputs, record_files, tiny_config

from feddip_lite.__main__ import main
from feddip_lite.config import FIELDS
from feddip_lite.methods import METHODS
from feddip_lite.records.store import COLUMNS, read_run

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
    (['--method-options={"upload": "sparse"}'], "upload: 'sparse'", "one of dense, masked"),
    (['--method-options={"server_memory": 1}'], "server_memory: 1", "true or false"),
    (['--method-options={"upload": "masked"}', "--preset=memory"], "upload: 'masked'", "'dense'"),
    (['--method-options={"mu": -1}', "--method=fedprox"], "mu: -1", "a number in [0, inf)"),
    (["--eval-every=0"], "eval_every: 0", "an integer >= 1"),
    (["--precision=fp16"], "precision: 'fp16'", "one of float32, tf32, bf16"),
    (["--precision=tf32", "--device=cpu"], "precision: 'tf32'", "float32 or bf16"),
    (["--on-client-failure=retry"], "on_client_failure: 'retry'", "one of abort, skip"),
    (["--client-timeout=0"], "client_timeout: 0", "a number in (0, inf)"),
    (["--device=gpu"], "device: 'gpu'", "auto, cpu, cuda or cuda:N"),
    (["--device=cuda:77"], "device: 'cuda:77'", "expected"),
    (["--workers=0"], "workers: 0", "auto or an integer >= 1"),
    (["--workers=many"], "workers: 'many'", "auto or an integer >= 1"),
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
        ([], "run | sweep | doctor"),
        (["rum"], "rum"),
        (["run", "--mehtod=fedavg"], "unknown name '--mehtod' (did you mean --method?)"),
        (["run", "--learning-rate", "0.1"], "unknown name '--learning-rate'"),
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
    assert set(record["provenance"]["data"]) == {"source", "variant", "sha256"}
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
