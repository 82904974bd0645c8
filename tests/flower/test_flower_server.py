"""Laws of the adapter to Flower, on a grid of one process (flower_grid.py): no network, no other processes."""

import copy
import importlib
import json
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import csv_without_seconds, names, tiny_config
from PIL import Image

from feddip_lite import register_dataset, run
from feddip_lite.core.errors import ClientFailure
from feddip_lite.core.flat import sha256_of
from feddip_lite.data.datasets import DATASETS
from feddip_lite.methods import METHODS
from feddip_lite.records.store import read_run
from feddip_lite.train.setup import deal

flwr = pytest.importorskip("flwr", reason="the extra feddip-lite[flower] is not installed (make flower)")

from flower_grid import Grid, finished, here, over, start  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

from feddip_lite.flower import client as flower_client  # noqa: E402
from feddip_lite.flower import server as flower  # noqa: E402
from feddip_lite.flower.link import TOKEN, Unreachable, token_of  # noqa: E402
from feddip_lite.flower.processes import APP  # noqa: E402

THREE = {"fedavg": {}, "feddip": {}, "feddst": {"preset": "repo", "mask_interval": 1}}
FEDDST = {"method": "feddst", **THREE["feddst"]}


@pytest.fixture(autouse=True)
def inside_a_run(monkeypatch):
    """Flower lets messages be made only inside a run of its own."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def same(one, other) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("weights", "buffers", "mask"))


@pytest.mark.parametrize("name", ["server_app", "client_app", "strategy", "dataset", "model", "utils"])
def test_the_apps_files_can_be_imported_as_flower_does(name, monkeypatch):
    monkeypatch.syspath_prepend(str(APP))
    module = importlib.import_module(f"feddip_app.{name}")
    assert hasattr(module, "app") or all(hasattr(module, public) for public in module.__all__)


@pytest.mark.parametrize("method", THREE)
def test_the_same_bits_as_in_one_process(method, tmp_path):
    config = tiny_config(method=method, **THREE[method])
    expected, records = finished(config, here)
    found, found_records = finished(config, over(Grid(config, tmp_path)))
    assert same(expected.state, found.state)
    assert repr(found_records) == repr(records)
    assert bool(expected.state.memories) == (method == "feddst")
    digests = {client: sha256_of(memory) for client, memory in expected.state.memories.items()}
    assert {client: token_of(memory).partition("-")[2] for client, memory in found.state.memories.items()} == digests


Q = "qsgd:8:512"
CODED = {
    "X4": {"method_options": {"upload": "masked", "mask_source": "masked_average"}, "up": Q, "down": Q},
    "screened": {"method_options": {"upload": "screened"}, "mask_interval": 1, "partition": "pathological"},
    "X4t": {"preset": "memory", "up": Q, "up_pruned": "ternary:512", "down": Q},
    "Fed-EF": {"method": "fedavg", "up": "topk:0.01", "up_feedback": "ef"},
    "X6": {
        "method_options": {"upload": "masked", "mask_source": "masked_average"},
        "up": Q,
        "down": Q,
        "mask_cache": True,
    },
    "EF21": {**FEDDST, "up": "sign", "down": "fp16", "up_feedback": "ef21"},
}


@pytest.mark.parametrize("name", CODED)
def test_coded_values_are_the_same_bytes_and_bits_as_in_one_process(name, tmp_path):
    config, grid = tiny_config(width=0.1, **CODED[name]), Grid(tiny_config(width=0.1, **CODED[name]), tmp_path)
    (expected, records), (found, found_records) = finished(config, here), finished(config, over(grid))
    assert same(expected.state, found.state) and repr(found_records) == repr(records)
    assert grid.bytes == {"up": found.up_bytes, "down": found.down_bytes}
    for name in ("estimates", "held"):
        here_, there = (getattr(progress.state, name) for progress in (expected, found))
        assert sha256_of({str(k): v for k, v in here_.items()}) == sha256_of({str(k): v for k, v in there.items()})
    digests = {client: sha256_of(memory) for client, memory in expected.state.memories.items()}
    assert {client: token_of(memory).partition("-")[2] for client, memory in found.state.memories.items()} == digests


def test_a_client_that_lost_what_its_training_left_says_so_and_nothing_is_merged(tmp_path):
    class Forgetful(Grid):
        def push_messages(self, envelopes):
            if envelopes[0].metadata.message_type == "train.tell":
                for path in self.folder.rglob("own"):
                    path.unlink()
            return super().push_messages(envelopes)

    config = tiny_config(width=0.1, **CODED["screened"])
    progress, advance = start(config, over(Forgetful(config, tmp_path)))
    advance()  # round 0 asks nothing
    before = progress.state
    with pytest.raises(ClientFailure, match="round 1, client .*own: what training left in round 1 is not here"):
        advance()
    assert progress.state is before


def test_a_reply_in_another_code_is_its_clients_failure(tmp_path):
    config = tiny_config(method="fedavg", up=Q, clients=3, width=0.1)
    renamed = of(1, payload=lambda data: sealed(data[:-4].replace(b"values qsgd:8:512", b"values qsgd:8:256")))
    progress, advance = start(config, over(Grid(config, tmp_path, spoil=renamed)))
    before = progress.state
    with pytest.raises(
        ClientFailure, match="round 0, client 1: .*holds 'values qsgd:8:256'; expected 'values qsgd:8:512'"
    ):
        advance()
    assert progress.state is before


def sealed(body):
    return body + zlib.crc32(body).to_bytes(4, "little")


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_runs_unchanged(method, tmp_path):
    config = tiny_config(method=method, rounds=2, clients=3, clients_per_round=2)
    (expected, records), (found, found_records) = finished(config, here), finished(config, over(Grid(config, tmp_path)))
    assert same(expected.state, found.state) and repr(found_records) == repr(records)


def test_the_byte_columns_are_the_bytes_that_travelled(tmp_path):
    config = tiny_config(method="feddip")
    grid = Grid(config, tmp_path)
    progress, _ = finished(config, over(grid))
    assert grid.bytes == {"up": progress.up_bytes, "down": progress.down_bytes}


def of(faulty, /, **changes):
    """A grid's `spoil` that changes words in the replies of one client; `payload` is a function of the payload."""

    def spoil(who, kind, words, payload):
        if who != faulty or kind != "train":
            return words, payload
        words = {**words, **{name: value for name, value in changes.items() if name != "payload"}}
        return words, changes.get("payload", bytes)(payload)

    return spoil


BAD = {
    "cut": ({"payload": lambda data: data[:-1]}, "checksum"),
    "flipped": ({"payload": lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:]}, "checksum"),
    "empty": ({"payload": lambda data: b""}, "too short"),
    "of another client": ({"client": 5}, "client: 5; expected"),
    "of another run": ({"run": "other"}, "run: 'other'; expected"),
    "of another round": ({"round": 7}, "round: 7; expected 0"),
    "to another offer": ({"received": 1}, "received: 1; expected"),
    "without a loss": ({"loss": "none"}, "loss: 'none' is not valid"),
    "that diverged": ({"failure": "Diverged: step 3"}, "Diverged: step 3"),
    "that raised": ({"failure": "MemoryError: no"}, "MemoryError: no"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("policy", ["abort", "skip"])
def test_a_bad_reply_is_its_clients_failure(kind, policy, tmp_path):
    changes, reason = BAD[kind]
    config = tiny_config(on_client_failure=policy, clients=3, width=0.1)
    progress, advance = start(config, over(Grid(config, tmp_path, spoil=of(1, **changes))))
    before = progress.state
    if policy == "abort":
        with pytest.raises(ClientFailure, match=f"round 0, client 1: .*{reason}"):
            advance()
        assert progress.state is before
    else:
        assert list(advance().skipped) == [1] and reason in progress.skipped[0]["reason"]


def test_what_is_merged_without_a_client_is_the_others(tmp_path):
    config = tiny_config(on_client_failure="skip", clients=3, width=0.1)

    def without(clients, method, config):
        return replace(clients, train=(clients.train[0], clients.train[1][:0], clients.train[2]))

    expected, _ = start(config, without)
    one, there = start(config, over(Grid(config, tmp_path, spoil=of(1, failure="RuntimeError: no"))))
    two, in_one_process = start(config, without)
    there(), in_one_process()
    assert list(one.skipped[0].items())[:2] == list(two.skipped[0].items())[:2] and same(one.state, two.state)
    assert not same(one.state, expected.state)


def test_claims_to_other_samples_than_in_the_handshake_are_refused(tmp_path):
    config = tiny_config(clients=3, width=0.1)

    def spoil(client, kind, words, payload):
        return ({**words, "samples": 1} if client == 2 and kind == "query" else words), payload

    _, advance = start(config, over(Grid(config, tmp_path, spoil=spoil)))
    with pytest.raises(ClientFailure, match=r"round 0, client 2: .*samples: \[479\] is not valid; expected \[1\]"):
        advance()


def test_silence_is_a_failure_when_the_time_is_up_and_a_late_reply_is_not_looked_at(tmp_path):
    config = tiny_config(on_client_failure="skip", clients=3, width=0.1)
    late = []

    def spoil(client, kind, words, payload):
        if client == 1 and kind == "train":
            late.append(words)
            return None
        return words, payload

    grid = Grid(config, tmp_path, spoil=spoil)
    _, advance = start(config, over(grid))
    assert advance().skipped == {1: "TimeoutError: no reply within 0.2 s"}
    grid.spoil = lambda client, kind, words, payload: (late[0] if client == 1 else words, payload)
    assert list(advance().skipped) == [1]  # the reply of round 0 is none to round 1


def test_the_first_round_waits_for_the_whole_federation(tmp_path):
    config = tiny_config()
    grid = Grid(config, tmp_path)
    del grid.nodes[101], grid.nodes[104]
    with pytest.raises(Unreachable, match=r"2 of 6 clients are not there after 0.2 s \(1, 4\)"):
        start(config, over(grid))


WRONG = {
    "run": ({"run": "other"}, "client 3: run is 'other' there"),
    "version": ({"version": "0"}, "client 3: version is '0' there"),
    "size": ({"of": 7}, "client 3: of is 7 there and 6 here"),
    "data": ({"data": "0"}, "client 3: its data set or split is another"),
    "split": ({"split": "0"}, "client 3: its data set or split is another"),
    "number": ({"client": 6}, "client 6 with 239 samples"),
    "samples": ({"samples": 0}, "client 3 with 0 samples"),
    "type": ({"samples": "240"}, "samples: '240' is not valid; expected int"),
    "twice": ({"client": 2}, "client 2: two nodes claim to be it"),
    "failure": ({"failure": "FileNotFoundError: data"}, "FileNotFoundError: data"),
}


def test_a_node_says_what_data_it_has(tmp_path):
    config = tiny_config(clients=3, width=0.1)
    said = []

    def spoil(client, kind, words, payload):
        said.append((words["client"], words["samples"], words["data"], words["split"]))
        return words, payload

    start(config, over(Grid(config, tmp_path, spoil=spoil)))
    data, split, _ = deal(config)
    assert sorted(said) == [(client, 479, data.sha256, split.sha256) for client in range(3)]


@pytest.mark.parametrize("what", WRONG)
def test_a_node_that_does_not_belong_is_refused_before_the_first_round(what, tmp_path):
    changes, reason = WRONG[what]
    config = tiny_config()

    def spoil(client, kind, words, payload):
        return ({**words, **changes} if client == 3 else words), payload

    with pytest.raises(Unreachable, match=reason):
        start(config, over(Grid(config, tmp_path, spoil=spoil), join=30))


def test_a_partition_id_out_of_range_is_refused(tmp_path):
    config = tiny_config(clients=3)
    with pytest.raises(Unreachable, match=r"partition-id: 3 is not valid; expected an integer in \[0, 2\]"):
        start(config, over(Grid(config, tmp_path, nodes={9: {"partition-id": 3}})))


def test_a_node_that_leaves_is_skipped_and_goes_on_from_its_memory_when_it_returns(tmp_path):
    config = tiny_config(**FEDDST, on_client_failure="skip", clients=3, width=0.1)
    grid = Grid(config, tmp_path)
    progress, advance = start(config, over(grid))
    advance()
    token = progress.state.memories[1][TOKEN]
    grid.nodes.pop(101)
    assert advance().skipped == {1: "Refused: 0 nodes claim to be it; expected one"}
    assert torch.equal(progress.state.memories[1][TOKEN], token)
    grid.nodes[777] = {"partition-id": 1}
    assert not advance().skipped and not torch.equal(progress.state.memories[1][TOKEN], token)


def test_a_server_that_resumes_one_round_back_finds_the_memories_that_go_with_it(tmp_path):
    config = tiny_config(**FEDDST, clients=3)
    grid = Grid(config, tmp_path)
    progress, advance = start(config, over(grid))
    advance()
    saved = copy.copy(progress)
    advance()
    straight, tokens = progress.state, progress.state.memories
    progress.__dict__.update(saved.__dict__)
    advance()
    assert same(progress.state, straight) and repr(progress.state.memories) == repr(tokens)


def test_a_server_that_resumes_further_back_is_refused(tmp_path):
    config = tiny_config(**FEDDST, clients=3, width=0.1)
    progress, advance = start(config, over(Grid(config, tmp_path)))
    advance()
    saved = copy.copy(progress)
    advance(), advance()
    assert [len(list(folder.glob("*.memory"))) for folder in tmp_path.glob("client */*/*")] == [2, 2, 2]
    progress.__dict__.update(saved.__dict__)
    with pytest.raises(ClientFailure, match=r"round 1, client 0: .*the memory of round 0 is not here"):
        advance()


@pytest.mark.parametrize("damage", ["cut", "another's"])
def test_a_damaged_memory_is_refused(damage, tmp_path):
    config = tiny_config(**FEDDST, clients=3, width=0.1)
    _, advance = start(config, over(Grid(config, tmp_path)))
    advance()
    (path,) = tmp_path.glob("client 2/*/*/*.memory")
    (other,) = tmp_path.glob("client 1/*/*/*.memory")
    path.write_bytes(path.read_bytes()[:-1] if damage == "cut" else other.read_bytes())
    with pytest.raises(ClientFailure, match=r"client 2: .*damaged \(SHA-256 does not match\)"):
        advance()


@pytest.mark.parametrize("token", ["../0-" + "0" * 64, "0", "x-" + "0" * 64, "0-" + "0" * 63])
def test_a_token_is_never_a_path(token, tmp_path):
    with pytest.raises(ValueError, match="token: .* is not valid"):
        flower_client.recall(tmp_path, token, None)


def images_of(config, folder):
    """Write each client's shard as images, `<folder>/<client>/<label>/<position>.png`."""
    from PIL import Image

    data, split, _ = deal(config)
    for client, shard in enumerate(split.train):
        for position, sample in enumerate(shard.tolist()):
            path = folder / str(client) / str(int(data.train_labels[sample])) / f"{position:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(data.train_images[sample, 0].numpy()).save(path)


def test_clients_with_folders_of_their_own_images_give_the_same_bits(tmp_path):
    config = tiny_config(method="feddip", clients=3)
    images_of(config, tmp_path / "images")
    nodes = {9 - i: {"partition-id": i, "folder": str(tmp_path / "images" / str(i))} for i in range(3)}
    expected, _ = finished(config, here)
    found, _ = finished(config, over(Grid(config, tmp_path, nodes), join=60))
    assert same(expected.state, found.state)


HOSPITAL = """
import numpy as np
def scans(folder):
    return np.full((8, 28, 28), 7, np.uint8), np.arange(8)
def none(folder):
    return np.empty((0, 28, 28), np.uint8), np.arange(0)
def floats(folder):
    return np.ones((8, 28, 28)), np.arange(8)
def unlabelled(folder):
    return np.ones((8, 28, 28), np.uint8), np.arange(7)
def eleventh(folder):
    return np.ones((1, 28, 28), np.uint8), np.array([10])
"""


def test_one_function_brings_a_clients_own_data(tmp_path, monkeypatch):
    (tmp_path / "hospital.py").write_text(HOSPITAL)
    monkeypatch.syspath_prepend(tmp_path)
    config = tiny_config(clients=3, clients_per_round=3, width=0.1, rounds=1)
    grid = Grid(config, tmp_path)
    grid.nodes[101]["data"] = "hospital:scans"
    progress, (record,) = finished(config, over(grid, join=60))
    mixed, (dealt,) = finished(config, here)
    assert not same(progress.state, mixed.state) and not record.skipped and record.train_loss != dealt.train_loss
    for name, reason in {
        "none": "expected uint8",
        "floats": "images: float64",
        "unlabelled": r"labels: int64 \(7,\); expected \(8,\)",
        "eleventh": r"integers in \[0, 10\)",
        "absent": "AttributeError",
    }.items():
        grid.nodes[101]["data"] = f"hospital:{name}"
        with pytest.raises(Unreachable, match=reason):
            start(config, over(grid, join=60))


def test_a_node_names_classes_as_the_registered_data_does_and_palettes_are_never_read_as_noise(tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (40, 28, 28), dtype=np.uint8), np.array(["bee", "ant"])[np.arange(40) % 2]
    monkeypatch.setitem(DATASETS, "insects", None)
    register_dataset("insects", lambda: (images[:30], labels[:30], images[30:], labels[30:]))
    for i, (image, label) in enumerate(zip(images[:8], labels, strict=False)):
        (tmp_path / "site" / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "site" / label / f"{i}.png")
    config = tiny_config(dataset="insects", clients=2, clients_per_round=2, width=0.1, rounds=1)
    found, split, _ = flower_client.own_data(config, 1, "", str(tmp_path / "site"))
    assert torch.equal(found.train_images[:, 0], torch.from_numpy(images[:8]))
    assert found.train_labels.tolist() == [1, 0] * 4 and len(split.train[1]) == 8
    Image.fromarray(images[0]).convert("P").save(tmp_path / "site" / "bee" / "0.png")
    read = flower_client.own_data(config, 1, "", str(tmp_path / "site"))[0].train_images[0]
    assert torch.equal(read, torch.from_numpy(images[0]).expand(3, -1, -1))
    (tmp_path / "site" / "bee").rename(tmp_path / "site" / "wasp")
    with pytest.raises(ValueError, match="labels: 'wasp' is not valid; expected one of ant, bee"):
        flower_client.own_data(config, 1, "", str(tmp_path / "site"))
    assert flower_client.numbered(np.array(["3", "0"]), ()).tolist() == [3, 0]
    with pytest.raises(ValueError, match="labels: 'ant' is not valid; expected numbers of classes"):
        flower_client.numbered(labels, ())


def served(folder, grid, **changes):
    """The outcome of `flower.serve`."""
    settings = {
        **grid.settings, "results": str(folder), "outcome": str(folder / "outcome.json"), "checkpoint-every": 1,
        "join-timeout": 0.2, "reply-timeout": 0.2, **changes,
    }  # fmt: skip
    try:
        flower.serve(grid, settings)
    except SystemExit as end:
        status = end.code
    else:
        status = 0
    said = json.loads((folder / "outcome.json").read_text())
    assert said["status"] == status
    return said


@pytest.mark.parametrize("method", ["feddip", "feddst"])
def test_a_served_run_is_recorded_as_in_one_process(method, tmp_path):
    config = tiny_config(method=method, **THREE[method])
    assert served(tmp_path / "there", Grid(config, tmp_path)) == {"status": 0, "line": ""}
    run(config, results_dir=tmp_path / "here", progress=False)
    name = f"{config.run_id}.csv"
    assert csv_without_seconds(tmp_path / "there" / name) == csv_without_seconds(tmp_path / "here" / name)
    states = [read_run(tmp_path / place, config.run_id)[1]["provenance"]["state_sha256"] for place in ("there", "here")]
    assert states[0] == states[1] and bool(states[0]["clients"]) == (method == "feddst")
    assert names(tmp_path / "there") == [*names(tmp_path / "here"), "outcome.json"]


def test_the_outcome_names_failures_and_bad_input(tmp_path):
    config = tiny_config(clients=3, width=0.1)
    grid = Grid(config, tmp_path, spoil=of(0, failure="RuntimeError: no"))
    said = served(tmp_path / "a", grid)
    assert said["status"] == 1 and "round 0, client 0" in said["line"]
    said = served(tmp_path / "b", grid, config='{"rounds": 0}')
    assert said["status"] == 2 and said["line"].startswith("rounds: 0 is not valid")


def test_a_server_that_was_interrupted_goes_on_to_the_same_bits(tmp_path):
    config = tiny_config(**FEDDST, clients=3)

    def dies_in_round_2(client, kind, words, payload):
        if words.get("round") == 2:
            raise KeyboardInterrupt
        return words, payload

    grid = Grid(config, tmp_path, spoil=dies_in_round_2)
    assert served(tmp_path / "there", grid)["status"] == 130
    assert names(tmp_path / "there") == [f"{config.run_id}.flower.checkpoint", "outcome.json"]
    grid = Grid(config, tmp_path)
    assert served(tmp_path / "there", grid)["status"] == 0
    run(config, results_dir=tmp_path / "here", progress=False)
    name = f"{config.run_id}.csv"
    assert csv_without_seconds(tmp_path / "there" / name) == csv_without_seconds(tmp_path / "here" / name)
    assert sum(number.startswith("message") for number in grid.waiting) == 0 and grid.count == 3 + 3
