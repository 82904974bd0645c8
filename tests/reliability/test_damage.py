"""Laws of damage: no file that was cut, flipped, swapped or made by another program is ever read as if it were good."""

import hashlib
import io
import json
import pickle
import random
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import FAST, flags, interrupted, read_outputs, tiny_config
from test_files import cifar_arrays, fashion_arrays, write_fashion
from test_store import history_of

from feddip_lite import load_results, run
from feddip_lite.__main__ import main
from feddip_lite.data import files
from feddip_lite.data.datasets import load_dataset
from feddip_lite.data.files import KEYS, checksum, save_npz
from feddip_lite.records.store import read_run, save_run
from feddip_lite.train.checkpoint import MAGIC, load_checkpoint

CPU = torch.device("cpu")
CONFIG = tiny_config(**FAST)
CUTS, FLIPS = 20, 50
DAMAGES = 1 + CUTS + FLIPS  # empty first


def damages(data: bytes):
    """`data` empty, cut at CUTS places, and with one bit flipped at FLIPS places."""
    draw = random.Random(len(data))
    yield b""
    for length in draw.choices(range(1, len(data)), k=CUTS):
        yield data[:length]
    for place in draw.choices(range(8 * len(data)), k=FLIPS):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        yield bytes(flipped)


def every_damage_is_refused(path, read, named=None):
    """`read` raises ValueError in one line that names the file (or `named`), whatever has become of `path`."""
    whole, count = path.read_bytes(), 0
    for data in damages(whole):
        path.write_bytes(data)
        with pytest.raises(ValueError) as caught:
            read()
        assert str(named or path) in str(caught.value)
        assert "\n" not in str(caught.value)
        count += 1
    assert count == DAMAGES
    path.write_bytes(whole)
    read()


@pytest.fixture(scope="module")
def checkpoint_bytes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.set_num_threads(1)
    interrupted(CONFIG, folder, stops=1)
    return (folder / f"{CONFIG.run_id}.checkpoint").read_bytes()


@pytest.fixture
def checkpoint(tmp_path, checkpoint_bytes):
    path = tmp_path / f"{CONFIG.run_id}.checkpoint"
    path.write_bytes(checkpoint_bytes)
    return path


def test_damaged_checkpoint_is_refused(checkpoint):
    every_damage_is_refused(checkpoint, lambda: load_checkpoint(checkpoint, CONFIG, CPU))


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_damaged_result_is_refused(tmp_path, kind):
    save_run(tmp_path, CONFIG.resolved(), history_of(), {"package": "0"}, [])
    path = tmp_path / f"{CONFIG.run_id}.{kind}"
    every_damage_is_refused(path, lambda: read_run(tmp_path, CONFIG.run_id))
    every_damage_is_refused(path, lambda: load_results(tmp_path))


@pytest.mark.parametrize("key", KEYS)
def test_damaged_idx_file_is_refused(tmp_path, monkeypatch, key):
    paths = write_fashion(tmp_path)
    monkeypatch.setitem(files.KNOWN["fashionmnist"], checksum(fashion_arrays()), "official")
    every_damage_is_refused(paths[key], lambda: load_dataset("fashionmnist", tmp_path), paths[key].parent)


@pytest.mark.parametrize("compressed", [False, True])
def test_damaged_npz_file_is_refused_or_its_contents_are_whole(tmp_path, compressed):
    path, arrays = tmp_path / "cifar10.npz", cifar_arrays()
    save_npz(path, arrays)
    if compressed:
        np.savez_compressed(path, **arrays)
    refused = 0
    for data in damages(path.read_bytes()):
        path.write_bytes(data)
        try:
            assert load_dataset("cifar10", tmp_path).sha256 == checksum(arrays)  # a date in the archive, for one
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused >= DAMAGES - 5


# Whole, but not ours


def sealed(content) -> bytes:
    """`content` as the tensors of a checkpoint whose checksum holds."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return MAGIC + hashlib.sha256(buffer.getvalue()).hexdigest().encode() + b"\n" + buffer.getvalue()


class Exploit:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def foreign_checkpoints(good: bytes, trap) -> dict[str, tuple[bytes, str]]:
    content = torch.load(io.BytesIO(good[len(MAGIC) + 65 :]), weights_only=True)
    state = content["state"]
    return {
        "of another version": (good.replace(b"checkpoint 3", b"checkpoint 9", 1), "not a checkpoint of this version"),
        "a pickle": (pickle.dumps(Exploit(trap)), "not a checkpoint of this version"),
        "with a pickle inside": (sealed({**content, "memory": Exploit(trap)}), "not a checkpoint (UnpicklingError"),
        "with a part missing": (sealed({"config": content["config"]}), "not a checkpoint (KeyError"),
        "with another part": (sealed({**content, "state": {**state, "wieghts": 0}}), "not a checkpoint (TypeError"),
        "a torch file": (good[len(MAGIC) + 65 :], "not a checkpoint of this version"),
        "HTML": (b"<!DOCTYPE html>", "not a checkpoint of this version"),
    }


FOREIGN = tuple(foreign_checkpoints(sealed({"state": {}, "config": "{}"}), ""))


@pytest.mark.parametrize("case", FOREIGN)
def test_checkpoint_that_is_not_ours_is_refused_and_nothing_in_it_is_run(checkpoint, tmp_path, case):
    data, reason = foreign_checkpoints(checkpoint.read_bytes(), tmp_path / "trap")[case]
    checkpoint.write_bytes(data)
    with pytest.raises(ValueError) as caught:
        load_checkpoint(checkpoint, CONFIG, CPU)
    assert f"{checkpoint}: {reason}" in str(caught.value)
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", 0.2), ("model", "alexnet"), ("width", 0.5), ("seed", 1), ("method", "fedavg"), ("dataset", "cifar10"),
     ("rounds", 4), ("partition", "pathological"), ("target_sparsity", 0.8), ("precision", "bf16")],
)  # fmt: skip
def test_checkpoint_of_another_configuration_is_refused_naming_what_differs(checkpoint, name, value):
    other = replace(CONFIG, **{name: value})
    path = checkpoint.rename(checkpoint.with_name(f"{other.run_id}.checkpoint"))
    with pytest.raises(ValueError, match=r"checkpoint of another configuration \(\w+ is .* there and .* here\)") as e:
        load_checkpoint(path, other, CPU)
    if name not in ("method", "model"):  # those bring other options with them, which may come first
        assert f"({name} is {getattr(CONFIG, name)!r} there and {value!r} here)" in str(e.value)


def test_a_checkpoint_that_is_older_than_a_setting_ran_under_its_default(checkpoint):
    whole = load_checkpoint(checkpoint, CONFIG, CPU).state
    content = torch.load(io.BytesIO(checkpoint.read_bytes()[len(MAGIC) + 65 :]), weights_only=True)
    values = json.loads(content["config"])
    del values["up"], values["down"], values["method_options"]["reentry"]
    checkpoint.write_bytes(sealed({**content, "config": json.dumps(values)}))
    assert torch.equal(load_checkpoint(checkpoint, CONFIG, CPU).state.weights, whole.weights)
    with pytest.raises(ValueError, match="another configuration .up is 'fp32' there and 'fp16' here"):
        load_checkpoint(checkpoint, replace(CONFIG, up="fp16"), CPU)


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_result_that_is_a_pickle_is_refused_and_not_run(tmp_path, kind):
    save_run(tmp_path, CONFIG.resolved(), history_of(), {}, [])
    (tmp_path / f"{CONFIG.run_id}.{kind}").write_bytes(pickle.dumps(Exploit(tmp_path / "trap")))
    with pytest.raises(ValueError, match=CONFIG.run_id):
        read_run(tmp_path, CONFIG.run_id)
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize(
    "edit",
    [lambda r: r["final"].update(best_accuracy=1.0), lambda r: r["config"].update(lr=0.2), lambda r: r.pop("skipped"),
     lambda r: r["provenance"].update(torch="9.9"), lambda r: r.update(note="by hand"), lambda r: r.pop("sha256")],
    ids=["accuracy", "configuration", "part missing", "provenance", "part added", "checksum"],
)  # fmt: skip
def test_edited_record_is_refused(tmp_path, edit):
    save_run(tmp_path, CONFIG.resolved(), history_of(), {"torch": "1"}, [])
    path = tmp_path / f"{CONFIG.run_id}.json"
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record, indent=1) + "\n")
    with pytest.raises(ValueError, match=f"{path}: damaged result"):
        read_run(tmp_path, CONFIG.run_id)


def test_command_line_says_in_one_line_which_file_is_damaged(tmp_path, capsys, checkpoint):
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    assert main(["run", *flags(**FAST), f"--results={tmp_path}", "--quiet"]) == 2
    out, err = read_outputs(capsys)
    assert (out, len(err)) == ([], 1)
    assert str(checkpoint) in err[0]
    checkpoint.unlink()
    run(CONFIG, results_dir=tmp_path, progress=False)


# Data


def archive(path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def members() -> dict[str, bytes]:
    return {f"{key}.npy": npy(array) for key, array in cifar_arrays().items()}


def hostile_archives() -> dict[str, dict[str, bytes]]:
    good = members()
    short = io.BytesIO()
    np.lib.format.write_array_header_1_0(short, {"descr": "|u1", "fortran_order": False, "shape": (6,)})
    return {
        "members outside its folder": {f"../{name}": content for name, content in good.items()},
        "members at the root": {f"/{name}": content for name, content in good.items()},
        "an array cut short": {**good, "train_labels.npy": short.getvalue() + b"\0" * 5},
        "an empty member": {**good, "test_images.npy": b""},
        "HTML in place of an array": {**good, "test_images.npy": b"<html>404</html>"},
        "labels that are NaN": {**good, "train_labels.npy": npy(np.full(6, np.nan))},
        "signed labels": {**good, "train_labels.npy": npy(np.full(6, -1, np.int8))},
        "words for labels": {**good, "train_labels.npy": npy(np.array(["cat"] * 6))},
        "names for columns": {**good, "train_labels.npy": npy(np.zeros(6, [("label", "u1")]))},
        "big pixels": {**good, "train_images.npy": npy(np.full((6, 32, 32, 3), 300, np.uint16))},
        "gray images": {**good, "train_images.npy": npy(np.zeros((6, 32, 32), np.uint8))},
        "nothing": {},
    }


HOSTILE = hostile_archives()


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archive_is_refused_and_leaves_no_trace(tmp_path, case):
    folder = tmp_path / "data"
    folder.mkdir()
    archive(folder / "cifar10.npz", HOSTILE[case])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError) as caught:
        load_dataset("cifar10", folder)
    assert str(folder / "cifar10.npz") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("whole", [False, True], ids=["an object in an array", "a member"])
def test_pickle_in_a_data_file_is_not_run(tmp_path, whole):
    trap = Exploit(tmp_path / "trap")
    content = pickle.dumps(trap) if whole else npy(np.array([trap] * 6, dtype=object))
    archive(tmp_path / "cifar10.npz", {**members(), "train_labels.npy": content})
    with pytest.raises(ValueError, match="cifar10.npz: .*(damaged|must be uint8)"):
        load_dataset("cifar10", tmp_path)
    (tmp_path / "cifar10.npz").write_bytes(pickle.dumps(trap))
    with pytest.raises(ValueError, match="cifar10.npz: damaged"):
        load_dataset("cifar10", tmp_path)
    assert not (tmp_path / "trap").exists()


def test_data_set_of_another_name_is_refused(tmp_path):
    arrays = cifar_arrays(train_labels=np.arange(94, 100, dtype=np.uint8))
    np.savez(tmp_path / "cifar10.npz", **arrays)
    with pytest.raises(ValueError, match=r"train_labels must lie in \[0, 10\), got 99"):
        load_dataset("cifar10", tmp_path)
