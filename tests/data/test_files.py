"""Laws of the data files: what is intact is read, what is damaged is refused by name, a download is kept whole."""

import gzip
import hashlib
import io
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

from feddip_lite.data import files
from feddip_lite.data.datasets import load_dataset
from feddip_lite.data.files import IDX_FILES, KEYS, checksum, save_npz

HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"


def cifar_arrays(n=6, **changes):
    rng = np.random.default_rng(0)
    arrays = {
        "train_images": rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8),
        "train_labels": rng.integers(0, 10, n, dtype=np.uint8),
        "test_images": rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8),
        "test_labels": np.array([3, 9], dtype=np.uint8),
    }
    return arrays | changes


def idx(array):
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def fashion_arrays():
    rng = np.random.default_rng(0)
    shapes, tops = ((5, 28, 28), 5, (3, 28, 28), 3), (256, 10, 256, 10)
    return {key: rng.integers(0, top, shape, np.uint8) for key, shape, top in zip(KEYS, shapes, tops, strict=True)}


def write_fashion(root, **changes):
    """Four small IDX files of `fashion_arrays`; `changes` replaces the bytes of one of `KEYS`. The paths by key."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    paths = dict(zip(KEYS, (raw / name for name in IDX_FILES), strict=True))
    for key, array in fashion_arrays().items():
        paths[key].write_bytes(changes.get(key, idx(array)))
    return paths


def refused(name, root, path, reason):
    """The load fails with one ValueError line that names the file and the reason."""
    with pytest.raises(ValueError) as caught:
        load_dataset(name, root)
    assert str(path) in str(caught.value)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cifar_file_arrives_as_channels_first_tensors(tmp_path):
    arrays = cifar_arrays()
    np.savez(tmp_path / "cifar10.npz", **arrays)
    data = load_dataset("cifar10", tmp_path)
    assert np.array_equal(data.train_images.permute(0, 2, 3, 1).numpy(), arrays["train_images"])
    assert np.array_equal(data.test_labels.numpy(), arrays["test_labels"])
    assert data.sha256 == checksum(arrays)
    assert data.variant == "unrecognised"
    assert data.augmentation == "zeros"


def test_root_comes_from_the_environment_when_not_given(tmp_path, monkeypatch):
    np.savez(tmp_path / "cifar10.npz", **cifar_arrays())
    monkeypatch.setenv("FEDDIP_DATA", str(tmp_path))
    assert len(load_dataset("cifar10").train_images) == 6


def test_checksum_sees_values_shapes_and_order_but_not_the_memory_layout():
    arrays = cifar_arrays()
    reference = checksum(arrays)
    assert checksum({key: np.asfortranarray(array) for key, array in arrays.items()}) == reference
    assert checksum(arrays | {"train_images": arrays["train_images"].reshape(6, 32, 96)}) != reference
    assert checksum(arrays | {"train_labels": arrays["train_labels"][::-1]}) != reference
    flipped = arrays["test_images"].copy()
    flipped[0, 0, 0, 0] ^= 1
    assert checksum(arrays | {"test_images": flipped}) != reference


def test_known_contents_are_named(tmp_path, monkeypatch):
    np.savez(tmp_path / "cifar10.npz", **cifar_arrays())
    monkeypatch.setitem(files.KNOWN["cifar10"], checksum(cifar_arrays()), "packed")
    data = load_dataset("cifar10", tmp_path)
    assert data.variant == "packed"
    assert "JPEG" in data.source


def test_kept_download_is_official_and_checked_against_its_sidecar_on_every_load(tmp_path):
    save_npz(tmp_path / "cifar10.npz", cifar_arrays())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cifar10.npz", "cifar10.sha256"]
    assert load_dataset("cifar10", tmp_path).variant == "official"
    np.savez(tmp_path / "cifar10.npz", **cifar_arrays(n=7))
    refused("cifar10", tmp_path, tmp_path / "cifar10.npz", "cifar10.sha256")


@pytest.mark.parametrize("failing_call", [1, 2])
def test_save_on_a_full_disk_leaves_no_data_and_no_litter_and_can_be_repeated(tmp_path, monkeypatch, failing_call):
    calls = iter(range(1, 9))

    def fsync(_):
        if next(calls) == failing_call:
            raise OSError("No space left on device")

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(OSError):
        save_npz(tmp_path / "cifar10.npz", cifar_arrays())
    assert {path.name for path in tmp_path.iterdir()} <= {"cifar10.sha256"}
    save_npz(tmp_path / "cifar10.npz", cifar_arrays())
    assert load_dataset("cifar10", tmp_path).variant == "official"


@pytest.mark.parametrize("words", [b"", b"0" * 64 + b"  official", b"\xff\xfe"], ids=["empty", "other", "binary"])
def test_sidecar_that_does_not_match_is_refused(tmp_path, words):
    np.savez(tmp_path / "cifar10.npz", **cifar_arrays())
    (tmp_path / "cifar10.sha256").write_bytes(words)
    refused("cifar10", tmp_path, tmp_path / "cifar10.npz", "cifar10.sha256")


BAD_ARRAYS = {
    "labels out of range": ({"train_labels": np.full(6, 10, np.uint8)}, "train_labels must lie in [0, 10)"),
    "labels as float": ({"test_labels": np.array([3.0, 9.0])}, "test_labels must be uint8, got float64"),
    "labels below 0": ({"test_labels": np.array([3, -1])}, "test_labels must be uint8, got int64"),
    "images as float": ({"train_images": np.full((6, 32, 32, 3), np.nan)}, "train_images must be uint8, got float64"),
    "channels first": ({"test_images": np.zeros((2, 3, 32, 32), np.uint8)}, "test_images must have shape"),
    "no images": ({"train_images": np.zeros((0, 32, 32, 3), np.uint8)}, "N >= 1"),
    "scalar labels": ({"train_labels": np.uint8(1)}, "train_labels must have shape"),
    "fewer labels than images": ({"train_labels": np.zeros(5, np.uint8)}, "5 train_labels for 6 train_images"),
    "objects": ({"train_labels": np.array([None] * 6)}, "allow_pickle=False"),
}


@pytest.mark.parametrize("changes, reason", BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_npz_with_malformed_arrays_is_refused(tmp_path, changes, reason):
    np.savez(tmp_path / "cifar10.npz", **cifar_arrays(**changes))
    refused("cifar10", tmp_path, tmp_path / "cifar10.npz", reason)


def test_npz_without_one_of_the_arrays_is_refused(tmp_path):
    arrays = cifar_arrays()
    del arrays["test_labels"]
    np.savez(tmp_path / "cifar10.npz", **arrays)
    refused("cifar10", tmp_path, tmp_path / "cifar10.npz", "needs each of")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_npz_with_an_array_twice_is_refused(tmp_path):
    path, member = tmp_path / "cifar10.npz", io.BytesIO()
    np.savez(path, **cifar_arrays())
    np.save(member, cifar_arrays()["train_labels"])
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("train_labels.npy", member.getvalue())
    refused("cifar10", tmp_path, path, "once")


def test_npz_that_unpacks_to_a_bomb_is_refused_before_it_does(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_NPZ_BYTES", 10_000)
    np.savez_compressed(tmp_path / "cifar10.npz", **cifar_arrays())
    refused("cifar10", tmp_path, tmp_path / "cifar10.npz", "unpacks to more than")


def test_array_header_that_announces_an_absurd_size_is_refused(tmp_path):
    path = tmp_path / "cifar10.npz"
    np.savez(path, **cifar_arrays())
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (9999999999999, 32, 32, 3), }\n"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["train_images.npy"] = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    refused("cifar10", tmp_path, path, "damaged")


@pytest.mark.parametrize("content, reason", [(HTML, "HTML"), (b"", "empty"), (b"\x93NUMPY", "not a zip file")])
def test_file_that_is_no_npz_is_refused(tmp_path, content, reason):
    (tmp_path / "cifar100.npz").write_bytes(content)
    refused("cifar100", tmp_path, tmp_path / "cifar100.npz", reason)


def test_npz_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "cifar10.npz"
    np.savez(path, **cifar_arrays())
    whole = path.read_bytes()
    for length in np.linspace(0, len(whole) - 1, 20, dtype=int):
        path.write_bytes(whole[:length])
        refused("cifar10", tmp_path, path, "")


def test_npz_with_any_flipped_bit_is_refused_or_has_the_same_contents(tmp_path):
    path, arrays = tmp_path / "cifar10.npz", cifar_arrays()
    np.savez(path, **arrays)
    whole = path.read_bytes()
    for position in np.random.default_rng(0).integers(0, len(whole), 50):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        try:
            assert load_dataset("cifar10", tmp_path).sha256 == checksum(arrays)
        except ValueError as error:
            assert str(path) in str(error)


IMAGES = idx(np.zeros((5, 28, 28), np.uint8))
BAD_IDX = {
    "cut": ("train_images", IMAGES[:-1], "damaged"),
    "cut in its header": ("train_images", IMAGES[:9], "damaged"),
    "longer than announced": ("train_images", IMAGES + b"\0", "damaged"),
    "wrong magic": ("test_images", b"\1" + IMAGES[1:], "damaged"),
    "wrong element type": ("test_images", b"\0\0\x09\3" + IMAGES[4:], "must be uint8, got int8"),
    "wider element type": ("test_images", b"\0\0\x0d\3" + IMAGES[4:], "damaged"),
    "labels in place of images": ("test_images", idx(np.zeros(3, np.uint8)), "must have shape"),
    "absurd size": ("test_images", b"\0\0\x08\3" + b"\xff" * 12, "damaged"),
    "html": ("train_labels", HTML, "HTML"),
    "empty": ("train_labels", b"", "empty"),
    "still compressed": ("train_images", b"\x1f\x8b\x08\0\0\0\0\0", "gunzip"),
    "other image size": ("train_images", idx(np.zeros((5, 27, 28), np.uint8)), "must have shape"),
    "label out of range": ("train_labels", idx(np.full(5, 10, np.uint8)), "must lie in [0, 10)"),
    "labels missing": ("test_labels", idx(np.zeros(2, np.uint8)), "2 test_labels for 3 test_images"),
}


@pytest.mark.parametrize("key, content, reason", BAD_IDX.values(), ids=BAD_IDX)
def test_malformed_idx_file_is_refused(tmp_path, key, content, reason):
    paths = write_fashion(tmp_path, **{key: content})
    refused("fashionmnist", tmp_path, paths[key], reason)


def test_fashion_mnist_with_one_changed_byte_is_refused(tmp_path, monkeypatch):
    paths = write_fashion(tmp_path)
    refused("fashionmnist", tmp_path, tmp_path / "FashionMNIST" / "raw", "unknown SHA-256")
    monkeypatch.setitem(files.KNOWN["fashionmnist"], checksum(fashion_arrays()), "official")
    data = load_dataset("fashionmnist", tmp_path)
    assert np.array_equal(data.train_images[:, 0].numpy(), fashion_arrays()["train_images"])
    assert np.array_equal(data.test_labels.numpy(), fashion_arrays()["test_labels"])
    content = bytearray(paths["train_images"].read_bytes())
    content[100] ^= 1
    paths["train_images"].write_bytes(content)
    refused("fashionmnist", tmp_path, tmp_path / "FashionMNIST" / "raw", "unknown SHA-256")


@pytest.mark.parametrize("name, file", [("fashionmnist", IDX_FILES[3]), ("cifar10", "cifar10.npz")])
def test_without_files_and_download_the_error_says_what_to_do(tmp_path, monkeypatch, name, file):
    monkeypatch.setitem(sys.modules, "torchvision", None)  # as if it were not installed
    with pytest.raises(FileNotFoundError) as caught:
        load_dataset(name, tmp_path / "nowhere")
    for remedy in (str(Path("nowhere")), file, "FEDDIP_DATA", "--dataset digits"):
        assert remedy in str(caught.value)


def test_download_is_kept_in_the_documented_form(tmp_path, monkeypatch):
    arrays = cifar_arrays()

    class Cifar:  # what torchvision's class offers after a download
        def __init__(self, root, train, download):
            part = "train" if train else "test"
            self.data, self.targets = arrays[f"{part}_images"], arrays[f"{part}_labels"].tolist()

    def fashion(root, train, download):
        if train:
            write_fashion(Path(root))

    monkeypatch.setattr(datasets, "CIFAR10", Cifar)
    monkeypatch.setattr(datasets, "FashionMNIST", fashion)
    monkeypatch.setitem(files.KNOWN["fashionmnist"], checksum(fashion_arrays()), "official")
    assert load_dataset("cifar10", tmp_path).sha256 == checksum(arrays)
    assert len(load_dataset("fashionmnist", tmp_path).test_images) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"cifar10.npz", "cifar10.sha256", "FashionMNIST"}
    monkeypatch.setitem(sys.modules, "torchvision", None)  # from now on only the files can serve
    assert load_dataset("cifar10", tmp_path).variant == "official"


def test_compressed_idx_files_are_read_as_they_are(tmp_path, monkeypatch):
    paths = write_fashion(tmp_path)
    monkeypatch.setitem(files.KNOWN["fashionmnist"], checksum(fashion_arrays()), "official")
    plain = load_dataset("fashionmnist", tmp_path)
    for path in paths.values():
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert load_dataset("fashionmnist", tmp_path).sha256 == plain.sha256
    packed = paths["train_images"].with_name(f"{paths['train_images'].name}.gz")
    packed.write_bytes(packed.read_bytes()[:-20])
    refused("fashionmnist", tmp_path, packed, "damaged")


def pickled(folder, arrays):
    """CIFAR-10 in six files as torchvision keeps it, and their MD5."""
    folder.mkdir()
    batches = {f"data_batch_{i + 1}": arrays["train_images"][i : i + 1] for i in range(5)}
    batches["test_batch"] = arrays["test_images"][:1]
    sums = []
    for name, images in batches.items():
        content = pickle.dumps({"data": images.transpose(0, 3, 1, 2).reshape(1, -1), "labels": [len(sums)]})
        (folder / name).write_bytes(content)
        sums.append([name, hashlib.md5(content).hexdigest()])
    meta = pickle.dumps({"label_names": list("abcdefghij")})
    (folder / "batches.meta").write_bytes(meta)
    return sums, hashlib.md5(meta).hexdigest()


def test_torchvisions_cifar_folder_is_read_if_every_file_has_its_published_md5(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    sums, meta = pickled(folder, cifar_arrays())
    with pytest.raises(ValueError, match="cifar-10-batches-py: .*another MD5 than published"):
        load_dataset("cifar10", tmp_path)
    monkeypatch.setattr(CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(CIFAR10, "test_list", sums[5:])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": meta})
    data = load_dataset("cifar10", tmp_path)
    assert data.variant == "official" and data.train_labels.tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(data.train_images.permute(0, 2, 3, 1).numpy(), cifar_arrays()["train_images"][:5])
    planted = tmp_path / "planted"
    (folder / "data_batch_3").write_bytes(pickle.dumps(Planted(planted)))
    with pytest.raises(ValueError, match="not unpickled"):
        load_dataset("cifar10", tmp_path)
    assert not planted.exists()


class Planted:
    """What writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")
