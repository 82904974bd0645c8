"""Where the arrays of a data set come from: files that are checked on every load, else a download that is kept.

Fashion-MNIST's files are read by torchvision, CIFAR's by numpy; neither torchvision nor scikit-learn is imported before
it is needed. A pickle is read only if it is the published one, by its MD5. Every refusal is one ValueError that names
the file and the reason.
"""

import gzip
import hashlib
import os
import socket
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

KEYS = ("train_images", "train_labels", "test_images", "test_labels")
IMAGE_SHAPES = {"digits": (28, 28), "fashionmnist": (28, 28), "cifar10": (32, 32, 3), "cifar100": (32, 32, 3)}
BATCHES = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
DIGITS = "scikit-learn's bundled digits"
DOWNLOAD_TIMEOUT_SECONDS = 30.0  # per network operation, so that a machine without network is told and does not hang
MAX_NPZ_BYTES = 2**30  # unpacked; a CIFAR set takes 184 MB, and a file that claims more than this is a bomb

# Checksums (see `checksum`) of the contents we have seen, and what they are called. The official CIFAR archives are
# instead recognised by the sidecar file that `_download` writes after torchvision has verified them.
KNOWN = {
    "digits": {"7694dd5bbfbfa40db2df637358411bca00ba72d37c27f5155d239e8e95dca890": "embedded"},
    "fashionmnist": {"eee656c63c1c7a3b7c885d28c97fd74dc039264ce75eae7cb8d991df379ef736": "official"},
    "cifar10": {"d0a8c47fb23832a46c91449de4ffef101df7db1298d2e009568234f33cbe6aaa": "packed"},
    "cifar100": {"d7e3181417062b45df526c02133cfe87ec859b8cc3c78bc90c2f486c1c128b52": "packed"},
}


def read_arrays(name: str, root: Path, classes: int) -> tuple[dict[str, np.ndarray], str, str]:
    """The four uint8 arrays `KEYS` of a data set, the checksum of their contents, and the name of their variant.

    Images are (N, H, W) or (N, H, W, 3), labels (N,) in [0, classes). Variants are "embedded", "official", "packed"
    (a known copy that is not byte-identical to the official set) and, for CIFAR only, "unrecognised".

    Raises:
        ValueError: a damaged or malformed file.
        FileNotFoundError: files that are missing and cannot be downloaded.
    """
    paths, variant = files_of(name, root), None
    found = files_here(name, root)
    if found is None:
        _download(name, root, paths)
        found = files_here(name, root)
    if name == "digits":
        arrays = _digits()
    elif name == "fashionmnist":
        paths = dict(zip(KEYS, found, strict=True))
        arrays = {key: _read(path, _idx) for key, path in paths.items()}
    elif paths["train_images"].is_file():
        arrays = _read(paths["train_images"], _npz)
    else:
        folder = root / BATCHES[name]
        arrays, paths, variant = _read(folder, partial(_batches, name)), dict.fromkeys(KEYS, folder), "official"
    _check(arrays, paths or dict.fromkeys(KEYS, DIGITS), IMAGE_SHAPES[name], classes)
    sha256 = checksum(arrays)
    return arrays, sha256, variant or _variant(name, sha256, root)


def files_here(name: str, root: Path) -> list[Path] | None:
    """The files that hold a data set below `root`, in one of the forms that are read: those of `files_of`, else
    Fashion-MNIST's as they are downloaded (`.gz`), or CIFAR's folder as torchvision keeps it; None if none is."""
    paths = list(dict.fromkeys(files_of(name, root).values()))
    if name == "fashionmnist":
        paths = [path if path.is_file() else path.with_name(f"{path.name}.gz") for path in paths]
    elif name in BATCHES and not paths[0].is_file():
        paths = sorted((root / BATCHES[name]).glob("*")) or paths
    return paths if all(path.is_file() for path in paths) else None


def checksum(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 over shape and C-ordered uint8 bytes of the four arrays, in the order of `KEYS`."""
    digest = hashlib.sha256()
    for key in KEYS:
        digest.update(repr(tuple(map(int, arrays[key].shape))).encode())
        digest.update(np.ascontiguousarray(arrays[key], dtype=np.uint8).data)
    return digest.hexdigest()


def files_of(name: str, root: Path) -> dict[str, Path]:
    """Which file holds which of the four arrays `KEYS`; empty for digits, which come with scikit-learn."""
    if name == "digits":
        return {}
    if name == "fashionmnist":
        return {key: root / "FashionMNIST" / "raw" / file for key, file in zip(KEYS, IDX_FILES, strict=True)}
    return dict.fromkeys(KEYS, root / f"{name}.npz")


def _digits() -> dict[str, np.ndarray]:
    from sklearn.datasets import load_digits

    bundle = load_digits()
    images = bundle.images.astype(np.uint8).repeat(3, axis=1).repeat(3, axis=2)  # nearest: 8 -> 24 pixels
    images, labels = np.pad(images, ((0, 0), (2, 2), (2, 2))), bundle.target.astype(np.uint8)
    # RandomState, because its stream is frozen for ever. Every 1797/360-th of a class-sorted list is a stratified draw.
    shuffled = np.random.RandomState(0).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    is_test = np.zeros(len(labels), dtype=bool)
    is_test[by_class[np.arange(360) * len(labels) // 360]] = True
    return dict(zip(KEYS, (images[~is_test], labels[~is_test], images[is_test], labels[is_test]), strict=True))


def _idx(path: Path) -> np.ndarray:
    """The array of an IDX file, which may be compressed."""
    from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor as read_idx

    if path.suffix != ".gz":
        return read_idx(path).numpy()
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, path.stem)
        with gzip.open(path) as packed:
            plain.write_bytes(packed.read())
        return read_idx(plain).numpy()


def _batches(name: str, folder: Path) -> dict[str, np.ndarray]:
    """The arrays of CIFAR's own files, which are pickles: torchvision reads them, once each has the published MD5."""
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity

    maker = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    if not all(check_integrity(folder / file, md5) for file, md5 in maker.train_list + maker.test_list):
        raise ValueError("a file is missing, or has another MD5 than published, so it is not unpickled")
    train, test = (maker(folder.parent, train=is_train) for is_train in (True, False))
    parts = (np.asarray(part, np.uint8) for part in (train.data, train.targets, test.data, test.targets))
    return dict(zip(KEYS, parts, strict=True))


def _read(path: Path, reader: Callable):
    """`reader(path)`; ValueError, naming the file, whatever goes wrong."""
    try:
        return reader(path)
    except Exception as error:  # torchvision, zipfile, zlib, ast and numpy raise a dozen different types on damage
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: damaged, or another kind of file ({_looks_like(path) or reason})") from error


def _npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays `KEYS` of an npz file, which holds each once, in less than `MAX_NPZ_BYTES` together."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    names = [member.filename.removesuffix(".npy") for member in members]
    if any(names.count(key) != 1 for key in KEYS):
        raise ValueError(f"needs each of {', '.join(KEYS)} once, holds {', '.join(names) or 'nothing'}")
    if sum(member.file_size for member in members) > MAX_NPZ_BYTES:
        raise ValueError(f"unpacks to more than {MAX_NPZ_BYTES} bytes")
    with np.load(path, allow_pickle=False) as archive:
        found = {key: np.asarray(archive[key]) for key in KEYS}  # a member that numpy does not know comes as its bytes
    for key, array in found.items():
        integers = key.endswith("labels") and array.dtype.kind in "iu" and array.size
        found[key] = array.astype(np.uint8) if integers and 0 <= array.min() <= array.max() < 256 else array
    return found


def _looks_like(path: Path) -> str:
    if path.is_dir():
        return ""
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        return "it is empty"
    if start.lstrip()[:1] == b"<":
        return "it looks like an HTML page: the download was answered by a web page"
    return "it is still compressed: run gunzip on it, or call it .gz" if start.startswith(b"\x1f\x8b") else ""


def _check(arrays: dict[str, np.ndarray], places: dict, image_shape: tuple[int, ...], classes: int) -> None:
    for key, array in arrays.items():
        where, tail = f"{places[key]}: {key}", image_shape if key.endswith("images") else ()
        if array.dtype != np.uint8:
            raise ValueError(f"{where} must be uint8, got {array.dtype}")
        if array.ndim != 1 + len(tail) or array.shape[1:] != tail or len(array) == 0:
            raise ValueError(f"{where} must have shape {('N', *tail)}, N >= 1, got {array.shape}")
        if key.endswith("labels") and array.max() >= classes:
            raise ValueError(f"{where} must lie in [0, {classes}), got {array.max()}")
    for images, labels in (KEYS[:2], KEYS[2:]):
        if len(arrays[images]) != len(arrays[labels]):
            raise ValueError(
                f"{places[labels]}: {len(arrays[labels])} {labels} for {len(arrays[images])} {images} "
                f"in {places[images]}; there must be equally many"
            )


def _variant(name: str, sha256: str, root: Path) -> str:
    """Name the variant of these contents; refuse contents that cannot be intact."""
    known = KNOWN[name].get(sha256)
    if name in ("digits", "fashionmnist"):
        if known is None:
            where = DIGITS if name == "digits" else root / "FashionMNIST" / "raw"
            raise ValueError(f"{where}: contents have the unknown SHA-256 {sha256}; damaged, install or download again")
        return known
    sidecar = root / f"{name}.sha256"
    words = sidecar.read_text(errors="replace").split() if sidecar.is_file() else [sha256]
    if words[:1] != [sha256]:
        raise ValueError(
            f"{root / f'{name}.npz'}: contents have SHA-256 {sha256}, but {sidecar} says {' '.join(words)[:80]!r}; "
            "the data is damaged (delete both files to download again) or was replaced on purpose (delete the latter)"
        )
    return known or ("official" if words[1:] == ["official"] else "unrecognised")


def _download(name: str, root: Path, paths: dict[str, Path]) -> None:
    """Fetch a data set with torchvision, which verifies it, and move it into place whole."""
    timeout = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)
        from torchvision import datasets

        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}-") as folder:
            maker = {"fashionmnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
            train, test = (maker[name](folder, train=is_train, download=True) for is_train in (True, False))
            if name == "fashionmnist":
                for path in paths.values():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(Path(folder, "FashionMNIST", "raw", path.name), path)
            else:
                parts = (np.asarray(part, np.uint8) for part in (train.data, train.targets, test.data, test.targets))
                save_npz(paths["train_images"], dict(zip(KEYS, parts, strict=True)))
    except Exception as error:  # no torchvision, a broken one, no network, a full disk: the remedy is the same
        missing = [str(path) for path in dict.fromkeys(paths.values()) if not path.is_file()]
        raise FileNotFoundError(
            f"{name}: the download failed ({type(error).__name__}: {error}). Put the missing {', '.join(missing)} "
            "there by hand, or set FEDDIP_DATA to another folder that holds the data in this layout, "
            "or use --dataset digits, which needs no files"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def save_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an official CIFAR set and the sidecar `<name>.sha256` that vouches for it, each whole or not at all.

    The sidecar goes first: a crash between the two leaves no data and the next load starts over, whereas data without
    its sidecar would pass as unrecognised.
    """
    line = f"{checksum(arrays)}  official\n".encode()
    writers = {path.with_suffix(".sha256"): lambda file: file.write(line), path: lambda file: np.savez(file, **arrays)}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-") as folder:
        for target, write in writers.items():
            part = Path(folder, target.name)
            with open(part, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
