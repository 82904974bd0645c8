"""Data of one's own: arrays, a folder of images or torch data sets become a `Dataset`, by name or without one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..core.settings import one_of
from .datasets import DATASETS, Dataset
from .files import IMAGE_SHAPES, KEYS

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
TEST_SHARE = 0.2  # of each class, where a folder does not say what is for testing


def register_dataset(name: str, loader: Callable[[], object]) -> None:
    """Make data known as `name`, for `Config`, the command line and profiles of this process.

    Args:
        loader: called without arguments, once per run; returns what `own_dataset` takes, or a `Dataset`.

    Raises:
        ValueError: the name is that of one of the four data sets that are always there.
    """
    if name in IMAGE_SHAPES:
        raise ValueError(f"dataset {name!r}: is always there; expected another name")
    DATASETS[name] = lambda: own_dataset(loader(), name=name)


def own_dataset(
    data: object, *, name: str = "", mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
    augmentation: str | None = None,
) -> Dataset:  # fmt: skip
    """A `Dataset` of one's own.

    Args:
        data: (train_images, train_labels, test_images, test_labels), arrays or tensors; or the path of a folder, class
            folders in it or in its folders `train` and `test`; or a pair of torch data sets of (image, label). Images
            are uint8 or floating, (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels, all of one size; labels
            integers or strings. A `Dataset` is given back as it is.
        name: default: `own-` and the first 8 hex digits of the data's SHA-256, in which class names, mean, std and
            augmentation are, too.
        mean, std: per channel, of pixels in [0, 1] (uint8) or as they are (floating); default: those of the training
            images. A channel without spread is only shifted.
        augmentation: random crop after padding by 4 pixels, "zeros" or "reflect", and flip; None = none.

    Raises:
        ValueError: what is wrong, in one line that names the part or the file.
    """
    if isinstance(data, Dataset):
        return data
    parts, source = _parts_of(data)
    images = {key: _images(part, key) for key, part in parts.items() if key.endswith("images")}
    labels, names = _labels(parts["train_labels"], parts["test_labels"])
    for key, own in labels.items():
        count = len(images[key.replace("labels", "images")])
        if len(own) != count:
            raise ValueError(f"{key}: {len(own)} of them for {count} images; expected equally many")
    shapes = {key: tuple(part.shape[1:]) for key, part in images.items()}
    if len({*shapes.values()}) > 1 or len({part.dtype for part in images.values()}) > 1:
        kinds = ", ".join(f"{key} {part.dtype} {shapes[key]}" for key, part in images.items())
        raise ValueError(f"images: {kinds}; expected one size and one dtype")
    if augmentation is not None:
        one_of("zeros", "reflect").require("augmentation", augmentation)
    tensors = {key: {**images, **labels}[key] for key in KEYS}
    scale = 255.0 if images["train_images"].dtype == torch.uint8 else 1.0
    found = _moments(images["train_images"], scale)
    given = [found[i] if told is None else tuple(map(float, told)) for i, told in enumerate((mean, std))]
    channels = shapes["train_images"][0]
    if any(len(each) != channels for each in given) or min(given[1]) <= 0:
        raise ValueError(f"mean, std: {given[0]}, {given[1]}; expected {channels} numbers each, those of std above 0")
    sha256 = _sha256(tensors, (names, *given, augmentation))
    return Dataset(
        name=name or f"own-{sha256[:8]}",
        classes=len(names),
        **tensors,
        scale=scale,
        mean=given[0],
        std=given[1],
        augmentation=augmentation,
        source=source,
        sha256=sha256,
        variant="own",
        class_names=names,
    )


def known_as(data: object) -> str:
    """Make `data`, as `own_dataset` takes it, known under a name of its own. Returns the name. Raises as it does."""
    dataset = own_dataset(data)
    if dataset.name not in IMAGE_SHAPES:
        DATASETS[dataset.name] = lambda: dataset
    return dataset.name


def _parts_of(data: object) -> tuple[dict[str, object], str]:
    """The four parts of what was given, by KEYS, and where they come from in words."""
    if isinstance(data, str | Path):
        return _folder(Path(data).expanduser()), "a folder of images"
    if isinstance(data, Sequence) and len(data) == 4:
        return dict(zip(KEYS, data, strict=True)), "arrays"
    if isinstance(data, Sequence) and len(data) == 2 and all(map(_is_torch_data, data)):
        pairs = [[part[i] for i in range(len(part))] for part in data]
        parts = [own for pair in pairs for own in zip(*pair, strict=True)]
        if len(parts) == 4:
            stacked = [np.stack([np.asarray(image) for image in part]) for part in parts[::2]]
            return dict(zip(KEYS, (stacked[0], parts[1], stacked[1], parts[3]), strict=True)), "torch data sets"
    kind = f"{type(data).__name__} of {len(data)}" if isinstance(data, Sequence) else type(data).__name__
    expected = "(train_images, train_labels, test_images, test_labels), a folder, or a pair of torch data sets"
    raise ValueError(f"data: a {kind}; expected {expected}")


def _is_torch_data(part: object) -> bool:
    return all(hasattr(part, name) for name in ("__getitem__", "__len__")) and not isinstance(part, np.ndarray | Tensor)


def _images(part: object, name: str) -> Tensor:
    """Images as uint8 or float32 (N, C, H, W)."""
    images = part.detach().cpu() if isinstance(part, Tensor) else torch.from_numpy(np.ascontiguousarray(part))
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"{name}: {images.dtype}; expected uint8 in [0, 255], or floating numbers")
    if images.dim() == 3:
        images = images.unsqueeze(1)
    first, last = (images.dim() == 4 and images.shape[place] in (1, 3) for place in (1, 3))
    if first and last:
        raise ValueError(f"{name}: {tuple(images.shape)} may have its channels first or last; expected (N, C, H, W)")
    if not (first or last) or not images.numel():
        shapes = "(N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels"
        raise ValueError(f"{name}: {tuple(images.shape)}; expected {shapes}, N >= 1")
    images = (images.permute(0, 3, 1, 2) if last else images).contiguous()
    images = images if images.dtype == torch.uint8 else images.float()
    if images.is_floating_point() and not bool(images.isfinite().all()):
        raise ValueError(f"{name}: NaN or infinite pixels; expected finite ones")
    return images


def _labels(train: object, test: object) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """int64 labels in [0, classes) of both parts, and what each class is called: in ascending order."""
    found = {}
    for name, part in (("train_labels", train), ("test_labels", test)):
        own = np.asarray(part.cpu() if isinstance(part, Tensor) else part)
        if own.ndim != 1 or own.dtype.kind not in "iuUSb":
            raise ValueError(f"{name}: {own.dtype} {own.shape}; expected (N,) integers or strings")
        found[name] = own.astype(str) if own.dtype.kind in "US" else own.astype(np.int64)
    if len({own.dtype.kind for own in found.values()}) > 1:
        raise ValueError("labels: integers for the one part and strings for the other; expected one kind")
    classes = np.unique(found["train_labels"])
    if len(classes) < 2:
        raise ValueError(f"train_labels: one class, {classes[0].item()!r}; expected two or more")
    if strange := sorted({*found["test_labels"].tolist()} - {*classes.tolist()}):
        raise ValueError(f"test_labels: {strange[0]!r} is no class of the training set")
    places = {name: torch.from_numpy(np.searchsorted(classes, own)) for name, own in found.items()}
    return places, tuple(map(str, classes))


def _moments(images: Tensor, scale: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, after division by `scale`."""
    channels = [images[:, channel].double() / scale for channel in range(images.shape[1])]
    deviations = (float(own.std(correction=0)) for own in channels)
    return tuple(float(own.mean()) for own in channels), tuple(each or 1.0 for each in deviations)


def _sha256(tensors: dict[str, Tensor], rest: tuple) -> str:
    """Checksum of the samples and of the `rest` that decides what a model sees of them."""
    digest = hashlib.sha256(repr(rest).encode())
    for key, tensor in tensors.items():
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _folder(folder: Path) -> dict[str, object]:
    """The images of a folder: of its `train` and `test`, or a fifth of each class for testing."""
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        read = [read_images(folder / part) for part in ("train", "test")]
        return dict(zip(KEYS, (own for part in read for own in part), strict=True))
    images, labels = read_images(folder)
    draw, held = np.random.default_rng(0), np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        own = draw.permutation(np.flatnonzero(labels == label))
        if len(own) < 2:
            raise ValueError(f"{folder / label}: one image; expected two or more, one of them for testing")
        held[own[: max(1, round(TEST_SHARE * len(own)))]] = True
    return dict(zip(KEYS, (images[~held], labels[~held], images[held], labels[held]), strict=True))


def read_images(folder: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """The images `<folder>/<class>/*.png` (or another of SUFFIXES), in order of file names: uint8 (N, H, W) if all are
    grey, else (N, H, W, 3); and the names of their classes.

    Grey and RGB images are taken as they are, black-and-white ones and palettes converted to these.

    Raises:
        ValueError: no images, of unlike sizes, or of another kind (transparent, 16 bits, CMYK); names the file.
    """
    from PIL import Image

    paths = [path for path in Path(folder).glob("*/*") if path.suffix.lower() in SUFFIXES]
    paths.sort(key=lambda path: (path.name, path.parent.name))
    if not paths:
        raise ValueError(f"{folder}: no images; expected {folder}/<class>/*.png, or another of {', '.join(SUFFIXES)}")
    read = []
    for path in paths:
        try:
            with Image.open(path) as image:
                read.append(_pixels(image))
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"{path}: {error}") from error
        if read[-1].shape[:2] != read[0].shape[:2]:
            sizes = [f"{own.shape[1]} x {own.shape[0]}" for own in (read[-1], read[0])]
            raise ValueError(f"{path}: {sizes[0]} pixels, {paths[0].name} has {sizes[1]}; expected one size")
    if any(own.ndim == 3 for own in read):
        read = [own if own.ndim == 3 else np.repeat(own[..., None], 3, axis=2) for own in read]
    return np.stack(read), np.array([path.parent.name for path in paths])


def _pixels(image) -> np.ndarray:
    """Pixels of a PIL image, uint8 (H, W) or (H, W, 3)."""
    wanted = {"L": "L", "RGB": "RGB", "1": "L", "P": "RGB"}.get(image.mode)
    if wanted is None or (image.mode == "P" and "transparency" in image.info):
        kind = "a transparent palette" if image.mode == "P" else f"mode {image.mode}"
        raise ValueError(f"{kind} is not taken, since converting it loses something; expected grey or RGB, 8 bits")
    return np.asarray(image.convert(wanted))
