"""Laws of whole runs: what a history holds, stored runs, divergence, several processes."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import (
    FAST,
    Remembering,
    csv_without_seconds,
    environment,
    flags,
    interrupted,
    names,
    same_history,
    start,
    tiny_config,
)
from torch.nn import functional as F

from feddip_lite import run
from feddip_lite.core.errors import ClientFailure
from feddip_lite.core.flat import FlatModel
from feddip_lite.core.models import build_model
from feddip_lite.core.sparsity import jaccard
from feddip_lite.data.datasets import normalise
from feddip_lite.methods import METHODS
from feddip_lite.records.store import COLUMNS, read_run
from feddip_lite.train.evaluate import evaluate_state
from feddip_lite.train.observe import Progress, Run
from feddip_lite.train.round import sample_cohort


def test_history_has_a_row_per_round_and_the_columns_of_a_results_file():
    config = tiny_config(**FAST)
    history = run(config, progress=False)
    assert list(history.columns) == COLUMNS
    assert history["round"].tolist() == [0, 1, 2]
    assert history["local_accuracy"].isna().all()
    assert history[["accuracy", "loss", "train_loss", "sparsity", "seconds"]].notna().all(axis=None)


def test_top5_accuracy_follows_accuracy_with_100_classes(federation):
    row = dict.fromkeys([*COLUMNS, "top5_accuracy"], 0.5)
    state, clients, method = federation(tiny_config())
    config = tiny_config(dataset="cifar100", model="resnet18")
    columns = list(Run(config, clients, method, Progress(state, rows=[row])).history().columns)
    assert columns == [*COLUMNS[:2], "top5_accuracy", *COLUMNS[2:]]


def test_same_configuration_gives_the_same_history_and_another_seed_another():
    first, again, other = (run(tiny_config(seed=seed, **FAST), progress=False) for seed in (0, 0, 1))
    assert same_history(first, again)
    assert not same_history(first, other)


def test_a_run_touches_neither_the_global_generator_nor_the_number_of_threads():
    torch.manual_seed(1)
    torch.set_num_threads(2)
    before = torch.random.get_rng_state()
    first = run(tiny_config(**FAST), progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_num_threads() == 2
    torch.manual_seed(2)
    assert same_history(first, run(tiny_config(**FAST), progress=False))


def test_run_without_a_results_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(tiny_config(**FAST), progress=False)
    assert list(tmp_path.iterdir()) == []


GROWING = {"mask_interval": 2, "target_sparsity": 0.5, "local_epochs": 4, "batch_size": 16, "width": 0.5}
"""With these, some pruned weights return."""


@pytest.mark.parametrize("eval_every", [1, 2, 3, 5])
def test_rare_evaluation_shares_its_rows_and_sums_what_happened_between_them(train, eval_every):
    config = tiny_config(rounds=7, lr=0.2, **GROWING)
    every = run(config, progress=False)
    rare = run(replace(config, eval_every=eval_every), progress=False)
    ends = [t for t in range(7) if (t + 1) % eval_every == 0 or t == 6]  # the last round is always evaluated
    assert rare["round"].tolist() == ends
    shared = every[every["round"].isin(ends)].reset_index(drop=True)
    summed = ["up_bytes", "down_bytes", "regrown"]
    others = [*summed, "mask_overlap"]  # `returned` is a matter of the masks so far, whoever looks
    assert same_history(rare.drop(columns=others), shared.drop(columns=others))
    assert every["regrown"].sum() > 0
    for name in summed:
        assert rare[name].tolist() == np.diff(every[name].cumsum()[ends], prepend=0).tolist()
    masks = [state.mask for state, _ in train(config)]
    before = [torch.ones_like(masks[0]), *(masks[t] for t in ends)]
    assert rare["mask_overlap"].tolist() == [jaccard(a, masks[t]) for a, t in zip(before, ends, strict=False)]


def test_returned_weights_over_regrown_is_how_many_rounds_one_stays(train):
    config = tiny_config(rounds=8, lr=0.2, **{**GROWING, "mask_interval": 1})
    rows, masks = run(config, progress=False), [state.mask.tolist() for state, _ in train(config)]
    stays = []
    for kept in zip(*masks, strict=True):  # the fate of one weight
        returned = False
        for before, now in zip((True, *kept), kept, strict=False):
            returned = now and (returned or not before)
            if returned and not before:
                stays.append(0)
            stays[-1:] = [stays[-1] + 1] if returned else stays[-1:]
    assert len(stays) == rows["regrown"].sum() > 0
    assert sum(stays) == rows["returned"].sum()


def test_a_row_per_round_is_what_the_rounds_say_of_themselves(train):
    config = tiny_config(rounds=5, lr=0.2, **GROWING)
    rows = run(config, progress=False)
    records = [record for _, record in train(config)]
    for name in ("regrown", "up_bytes", "down_bytes"):
        assert rows[name].tolist() == [getattr(record, name) for record in records]


@pytest.mark.parametrize("partition", ["iid", "pathological"])
def test_evaluation_is_of_the_sparse_model_on_the_whole_test_set(federation, partition):
    config = tiny_config(partition=partition)
    state, clients, method = federation(config)
    data = clients.data
    module = build_model("lenet5", classes=10, width=0.3, channels=1, size=28)
    FlatModel(module, method.layout).load(state.weights, state.mask)
    logits = module.eval()(normalise(data.test_images, data)).detach()
    correct = (logits.argmax(1) == data.test_labels).double()
    metrics = evaluate_state(state, clients)
    assert metrics["accuracy"] == pytest.approx(correct.mean().item())
    assert metrics["loss"] == pytest.approx(F.cross_entropy(logits, data.test_labels).item(), rel=1e-6)
    top5 = (logits.topk(5).indices == data.test_labels[:, None]).any(1).double().mean().item()
    assert metrics["top5_accuracy"] == pytest.approx(top5)
    own = [correct[shard].mean().item() for shard in clients.test]
    assert metrics["local_accuracy"] == pytest.approx(sum(own) / len(own))


def test_local_accuracy_is_recorded_where_clients_differ():
    history = run(tiny_config(partition="pathological", **FAST), progress=False)
    assert history["local_accuracy"].notna().all()


def test_stored_run_is_returned_without_recomputation(tmp_path, monkeypatch, remembering):
    config = tiny_config(method=remembering, **FAST)
    first = run(config, results_dir=tmp_path, progress=False)
    files = {path.name: path.read_bytes() for path in tmp_path.glob("*.*") if path.is_file()}

    def unwilling(*arguments):
        raise AssertionError("computed again")

    monkeypatch.setattr("feddip_lite.train.run.prepare", unwilling)
    assert run(config, results_dir=tmp_path, progress=False).equals(first)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.*") if path.is_file()} == files


def test_skipped_clients_are_recorded_beside_the_results(tmp_path, monkeypatch, remembering):
    config = tiny_config(method=remembering, on_client_failure="skip", **FAST)
    victim = sample_cohort(config, 1)[0]

    class Fails(Remembering):
        def offer(self, state, t, client):
            offer = super().offer(state, t, client)
            return replace(offer, extras={"fail": torch.tensor([(t, client) == (1, victim)])})

        def plan(self, offer, memory, t):
            if offer.extras["fail"][0]:
                raise RuntimeError("gone")
            return super().plan(offer, memory, t)

    monkeypatch.setitem(METHODS, remembering, Fails)
    count, _ = interrupted(config, tmp_path)  # a skip survives in the checkpoint
    record = json.loads((tmp_path / f"{config.run_id}.json").read_text())
    assert count == 2
    assert record["skipped"] == [{"round": 1, "client": victim, "reason": "RuntimeError: gone"}]


# Divergence


@pytest.mark.parametrize("policy", ["abort", "skip"])
def test_diverging_run_stops_naming_round_and_client_and_is_recorded_as_diverged(tmp_path, policy):
    config = tiny_config(lr=1e4, local_epochs=3, rounds=20, on_client_failure=policy)
    with pytest.raises((ValueError, ClientFailure), match=r"round \d+.* client \d+: .*last finite loss") as caught:
        run(config, results_dir=tmp_path, progress=False)
    history, record = read_run(tmp_path, config.run_id)
    assert record["diverged"] == {"round": len(history), "reason": str(caught.value)}
    assert names(tmp_path) == [f"{config.run_id}.csv", f"{config.run_id}.json"]


def test_global_model_with_a_loss_that_is_not_finite_stops_the_run(federation):
    state, clients, _ = federation(tiny_config())
    with pytest.raises(ValueError, match=r"round 6: the global model's test loss is (nan|inf)"):
        evaluate_state(replace(state, round=7, weights=state.weights * 1e30), clients)


# Several processes


def finish(*processes):
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return [output[0] for output in outputs]


def test_fresh_processes_write_the_same_results_but_for_seconds(tmp_path):
    config = tiny_config()
    finish(
        start(tmp_path / "a", *flags(), PYTHONHASHSEED="1"),
        start(tmp_path / "b", *flags(workers=3), PYTHONHASHSEED="2", OMP_NUM_THREADS="1"),
    )
    a, b = (tmp_path / folder / f"{config.run_id}.csv" for folder in "ab")
    assert csv_without_seconds(a) == csv_without_seconds(b)
    here = run(config, progress=False)
    assert same_history(read_run(a.parent, config.run_id)[0], here)


COUNTING = """
import sys
from feddip_lite import Config, run
from feddip_lite.methods import METHODS
from feddip_lite.methods.fedavg import FedAvg

class Counting(FedAvg):
    rounds_done = 0
    def merge(self, state, replies, t):
        Counting.rounds_done += 1
        return super().merge(state, replies, t)

METHODS["counting"] = Counting
config = Config(method="counting", width=0.3, clients=6, clients_per_round=3, rounds=20, local_epochs=1, device="cpu")
history = run(config, results_dir=sys.argv[1], progress=False)
print(Counting.rounds_done, len(history), float(history["seconds"].sum()))
"""


def test_two_processes_asked_for_the_same_run_compute_it_once(tmp_path):
    command = [sys.executable, "-c", COUNTING, str(tmp_path)]
    pair = [subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [output.splitlines()[-1].split() for output in finish(*pair)]
    assert sorted(int(answer[0]) for answer in answers) == [0, 20]
    assert answers[0][1:] == answers[1][1:]  # both return the history of the one that computed
    assert [name.rpartition(".")[2] for name in names(tmp_path)] == ["csv", "json", "safetensors"]
