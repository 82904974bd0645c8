"""Data sets as uint8 tensors, checked on every load, and what happens to a batch: augmentation and normalisation.

How files are found, read and refused is in `files.py`; how samples are shared out over clients in `partition.py`.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..core.seeds import torch_generator
from ..core.settings import integer, key_of
from .files import KEYS, read_arrays

PAD = 4  # pixels around a CIFAR image before the random crop
OFFSETS = 2 * PAD + 1

# The fields of Dataset that follow from the name; a registered name has a function that gives the Dataset.
# Fashion-MNIST and digits are only divided by their maximum.
_DIVIDED_ONLY = {"mean": (0.0,), "std": (1.0,), "augmentation": None}
DATASETS = {
    "digits": {"classes": 10, "scale": 16.0, **_DIVIDED_ONLY},
    "fashionmnist": {"classes": 10, "scale": 255.0, **_DIVIDED_ONLY},
    "cifar10": {
        "classes": 10,
        "scale": 255.0,
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "augmentation": "zeros",
    },
    "cifar100": {
        "classes": 100,
        "scale": 255.0,
        "mean": (0.5071, 0.4865, 0.4409),
        "std": (0.2673, 0.2564, 0.2762),
        "augmentation": "reflect",
    },
}
PUBLISHED_CIFAR100 = {"mean": (0.507, 0.487, 0.441), "std": (0.267, 0.256, 0.276)}
_TITLES = {
    "digits": "Handwritten digits",
    "fashionmnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
}
_SOURCES = {
    "embedded": "the 1797 images bundled with scikit-learn, stratified 1437/360 split with a fixed seed",
    "official": "the official files",
    "cifar10 packed": "a repacked copy: official train/test split, but another order within each split, and 200 images "
    "decoded from JPEG",
    "cifar100 packed": "a repacked copy that is a re-split: 100 test images per class were drawn anew, so this is NOT "
    "the official train/test split",
    "unrecognised": "a file whose checksum is not known",
}


@dataclass(frozen=True, eq=False)
class Dataset:
    """A whole data set in memory, with everything needed to turn a batch of it into network input.

    `train_images`, `test_images`: uint8 (N, C, H, W); `train_labels`, `test_labels`: int64 (N,) in [0, classes).
    `scale` is the largest possible pixel; `mean` and `std` hold one number per channel, after division by `scale`,
    or a single (0.,), (1.,) where the authors only divide. `augmentation` is the padding of the random crop.
    `source`, `sha256` and `variant` say what was loaded; they belong into a run's provenance. Data of one's own may be
    floating, and `class_names` says what its classes are called.
    """

    name: str
    classes: int
    train_images: torch.Tensor = field(repr=False)
    train_labels: torch.Tensor = field(repr=False)
    test_images: torch.Tensor = field(repr=False)
    test_labels: torch.Tensor = field(repr=False)
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: str | None
    source: str
    sha256: str
    variant: str
    class_names: tuple[str, ...] = ()

    @property
    def model_shape(self) -> dict[str, int]:
        """What a model of these images is told: `classes`, `channels`, and `size`, their height in pixels."""
        channels, size = self.train_images.shape[1:3]
        return {"classes": self.classes, "channels": channels, "size": size}

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data set with its four tensors on `device`."""
        return replace(self, **{key: getattr(self, key).to(device) for key in KEYS})


def load_dataset(name: str, root: str | os.PathLike | None = None) -> Dataset:
    """Load "digits", "fashionmnist", "cifar10" or "cifar100", downloading it only if its files are not there.

    Args:
        name: the data set, or one that was registered; "digits" needs neither files nor network.
        root: folder that holds `FashionMNIST/raw/*-ubyte` or `*-ubyte.gz` (torchvision's layout), `cifar10.npz`,
            `cifar100.npz` (uint8 arrays train_images, train_labels, test_images, test_labels; images NHWC) or
            `cifar-10-batches-py`, `cifar-100-python` (torchvision's). Default: the environment variable FEDDIP_DATA,
            else "data".

    Raises:
        ValueError: an unknown name, or a file that is damaged or malformed; the message names file and reason.
        FileNotFoundError: neither files nor a download; the message says what to do.
    """
    key_of(DATASETS).require("dataset", name)
    if callable(own := DATASETS[name]):
        return own()
    folder = Path(root or os.environ.get("FEDDIP_DATA") or "data").expanduser()
    arrays, sha256, variant = read_arrays(name, folder, DATASETS[name]["classes"])
    source = f"{_TITLES[name]}: {_SOURCES.get(f'{name} {variant}') or _SOURCES[variant]}"
    return dataset_of(name, arrays, source, sha256, variant)


def dataset_of(name: str, arrays: Mapping[str, np.ndarray], source: str, sha256: str, variant: str) -> Dataset:
    """The arrays `files.KEYS` (images uint8, (N, H, W) or (N, H, W, 3)) with what data set `name` is scaled by."""
    tensors = {}
    for part in ("train", "test"):
        images = torch.from_numpy(arrays[f"{part}_images"])
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        tensors |= {f"{part}_images": images, f"{part}_labels": torch.from_numpy(arrays[f"{part}_labels"]).long()}
    return Dataset(name=name, **tensors, **fields_of(name), source=source, sha256=sha256, variant=variant)


def fields_of(name: str) -> Mapping:
    """What `Dataset` holds of a data set beside its samples: classes, scale, mean, std, augmentation; and the names of
    the classes of one that was registered."""
    if not callable(known := DATASETS[name]):
        return known
    names = ("classes", "scale", "mean", "std", "augmentation", "class_names")
    own = known()
    return {key: getattr(own, key) for key in names}


def as_published(dataset: Dataset) -> Dataset:
    """CIFAR-100 normalised as in the published FedDIP code (`datasets_models.py:load_data`), whose three-digit mean and
    standard deviation are divided by 255 a second time (docs/deviations.md D17); any other data set as it is."""
    if dataset.name != "cifar100":
        return dataset
    twice = {key: tuple(value / 255 for value in values) for key, values in PUBLISHED_CIFAR100.items()}
    return replace(dataset, **twice)


def fit_images(dataset: Dataset, channels: int, size: int) -> Dataset:
    """Make the images fit a network: zero-padded around the centre to squares of at least `size` pixels a side, a
    single channel repeated. They are never shrunk.

    Raises:
        ValueError: another number of channels than `channels` unless it is one.
    """
    have, height, width = dataset.train_images.shape[1:]
    size = max(size, height, width)
    integer(have, None if have == 1 else have).require("channels", channels, dataset.name)
    top, left = (size - height) // 2, (size - width) // 2
    border = (left, size - width - left, top, size - height - top)

    def fit(images: torch.Tensor) -> torch.Tensor:
        return F.pad(images, border).expand(-1, channels, -1, -1).contiguous()

    return replace(dataset, train_images=fit(dataset.train_images), test_images=fit(dataset.test_images))


def hold_out(dataset: Dataset, share: float, generator: torch.Generator) -> Dataset:
    """The data set with a random `share` of each class's training samples in place of its test set, in their order:
    for choosing settings without a look at the test set.

    Raises:
        ValueError: a class would have no sample on one of the two sides.
    """
    held = torch.zeros(len(dataset.train_labels), dtype=torch.bool)
    for label in range(dataset.classes):
        own = (dataset.train_labels == label).nonzero()[:, 0]
        count = round(share * len(own))
        if not 0 < count < len(own):
            raise ValueError(f"validation: {share} is not valid; class {label} has {len(own)} training samples")
        held[own[torch.randperm(len(own), generator=generator)[:count]]] = True
    images, labels = dataset.train_images, dataset.train_labels
    left = {"train_images": images[~held], "train_labels": labels[~held]}
    return replace(dataset, **left, test_images=images[held], test_labels=labels[held])


def normalise(images: torch.Tensor, dataset: Dataset) -> torch.Tensor:
    """Network input of a batch: (images / scale - mean) / std per channel.

    Args:
        images: uint8 (b, C, H, W), on any device; leading dimensions may be more.

    Returns:
        float32 of the same shape on the same device; the input is unchanged.
    """
    out = images.to(torch.float32) / dataset.scale
    if len(dataset.mean) not in (1, images.shape[-3]):
        raise ValueError(f"images must have {len(dataset.mean)} channels, got shape {tuple(images.shape)}")
    for channel, (mean, std) in enumerate(zip(dataset.mean, dataset.std, strict=True)):
        # Plain numbers, channel by channel: a small tensor of means would have to be copied to the device every time.
        part = out if len(dataset.mean) == 1 else out[..., channel, :, :]
        if (mean, std) != (0.0, 1.0):
            part.sub_(mean).div_(std)
    return out


def augment(images: torch.Tensor, padding: str | None, generator: torch.Generator) -> torch.Tensor:
    """Random crop after padding by 4 pixels and random horizontal flip, drawn for each image on its own.

    Args:
        images: uint8 (b, C, H, W), on any device.
        padding: "zeros" (CIFAR-10) or "reflect" (CIFAR-100); None returns the images as they are and draws nothing.
        generator: the only source of randomness, on its own device: one CPU generator gives the same crops anywhere.

    Returns:
        uint8 of the same shape on the same device; the input is unchanged.

    Raises:
        ValueError: an unknown `padding`, or images too small to reflect (5 pixels are needed).

    Source: the FedDIP authors' transforms (RandomCrop(32, padding=4), RandomHorizontalFlip).
    """
    return images if padding is None else crop(images, padding, draw_crops((len(images),), generator).to(images.device))


def draw_crops(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """int64 of `shape` in [0, 162): row offset, column offset (9 each) and flip of a crop in one number, so that a
    whole round's draws cost one transfer to another device."""
    return torch.randint(OFFSETS * OFFSETS * 2, shape, generator=generator, device=generator.device)


def draw_epochs(
    dataset: Dataset, count: int, epochs: int, seed: int, address: tuple[int, ...], purpose: str = "shuffle"
) -> torch.Tensor:
    """All draws of a client's `epochs` passes over its `count` training samples, at this address: int64 on the CPU,
    so that they are the same everywhere. (epochs, 1, count) is the order of the samples in each pass; where the data
    set is augmented (epochs, 2, count), with the crop of each."""
    shuffle = torch_generator(seed, purpose, *address)
    draws = [torch.stack([torch.randperm(count, generator=shuffle) for _ in range(epochs)])]
    if dataset.augmentation is not None:
        draws.append(draw_crops(draws[0].shape, torch_generator(seed, "augment", *address)))
    return torch.stack(draws, 1)


def crop(images: torch.Tensor, padding: str, draw: torch.Tensor) -> torch.Tensor:
    """`augment` with the crops that `draw` (b,) of `draw_crops` says."""
    batch, channels, height, width = images.shape
    if padding not in ("zeros", "reflect") or (padding == "reflect" and min(height, width) <= PAD):
        raise ValueError(
            f'padding must be "zeros", "reflect" (images of {PAD + 1} pixels or more) or None, got {padding!r} for '
            f"images of {height}x{width}"
        )
    rows, rows_inside = _source_pixels(draw // (2 * OFFSETS), height, padding)
    columns, columns_inside = _source_pixels(draw // 2 % OFFSETS, width, padding, flip=draw % 2 == 1)
    pixels = (rows[:, :, None] * width + columns[:, None, :]).view(batch, 1, height * width)
    out = images.flatten(2).gather(2, pixels.expand(-1, channels, -1)).view(images.shape)
    if padding == "zeros":
        out *= (rows_inside[:, :, None] & columns_inside[:, None, :])[:, None]
    return out


def _source_pixels(offset: torch.Tensor, size: int, padding: str, flip: torch.Tensor | None = None):
    """Along one axis, which input pixel each output pixel shows: (b, size) indices, and whether it is inside."""
    index = offset[:, None] + torch.arange(-PAD, size - PAD, device=offset.device)
    if flip is not None:
        index = torch.where(flip[:, None], index.flip(1), index)
    inside = (index >= 0) & (index < size)
    if padding == "zeros":
        return index.clamp(0, size - 1), inside
    # torch pads by reflection only in floating point, so the indices are reflected instead of the images.
    return (size - 1) - ((size - 1) - index.abs()).abs(), inside
