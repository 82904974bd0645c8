"""Laws of one's own data: what is taken, what it becomes, what is refused and how; and the run's identity."""

import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image
from torch.utils.data import TensorDataset

from feddip_lite import load_results, own_dataset, register_dataset, run
from feddip_lite.data.datasets import DATASETS, load_dataset, normalise
from feddip_lite.data.own import read_images

draw = np.random.default_rng(0)
IMAGES = draw.integers(0, 256, (30, 20, 24, 3), dtype=np.uint8)
LABELS = np.arange(30) % 3
PARTS = IMAGES[:20], LABELS[:20], IMAGES[20:], LABELS[20:]
RUN = {"clients": 2, "clients_per_round": 2, "rounds": 1, "width": 0.3}


pytestmark = pytest.mark.usefixtures("forgetting")


def test_every_shape_of_the_same_images_is_the_same_data():
    usual = own_dataset(PARTS)
    first = [np.moveaxis(part, 3, 1) if part.ndim == 4 else part for part in PARTS]
    tensors = [torch.from_numpy(part) for part in first]
    for given in (first, tensors, tuple(map(list, PARTS[1::2])) and (first[0], LABELS[:20].tolist(), *first[2:])):
        other = own_dataset(given)
        assert other.sha256 == usual.sha256 and other.name == usual.name == f"own-{usual.sha256[:8]}"
    pairs = [TensorDataset(tensors[i], torch.from_numpy(PARTS[i + 1])) for i in (0, 2)]
    assert own_dataset(pairs).sha256 == usual.sha256
    pictures = [
        [(Image.fromarray(image), int(label)) for image, label in zip(*PARTS[i : i + 2], strict=True)] for i in (0, 2)
    ]
    assert own_dataset(pictures).sha256 == usual.sha256  # as torchvision's ImageFolder gives them
    grey = own_dataset((IMAGES[:20, ..., 0], LABELS[:20], IMAGES[20:, ..., 0], LABELS[20:]))
    assert grey.train_images.shape == (20, 1, 20, 24)


@pytest.mark.parametrize("names", [["cat", "dog", "emu"], [7, -3, 100], np.array([2, 1, 0], dtype=np.uint8)])
def test_labels_of_any_kind_count_from_zero_in_ascending_order(names):
    own = np.array(names)[LABELS]
    data = own_dataset((IMAGES[:20], own[:20], IMAGES[20:], own[20:]))
    order = sorted(names)
    assert data.class_names == tuple(map(str, order)) and data.classes == 3
    assert [order[label] for label in data.train_labels.tolist()] == own[:20].tolist()


def test_images_are_normalised_by_the_training_sets_own_moments_unless_told():
    data = own_dataset(PARTS)
    seen = normalise(data.train_images, data)
    torch.testing.assert_close(seen.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen.std((0, 2, 3), correction=0), torch.ones(3))
    floats = [part / 255.0 if part.ndim == 4 else part for part in PARTS]
    torch.testing.assert_close(normalise(own_dataset(floats).train_images, own_dataset(floats)), seen)
    told = own_dataset(PARTS, mean=(0, 0, 0), std=(1, 1, 1))
    torch.testing.assert_close(normalise(told.train_images, told), told.train_images / 255)
    flat = own_dataset((np.full((6, 8, 8), 9, np.uint8), LABELS[:6], np.zeros((3, 8, 8), np.uint8), LABELS[:3]))
    assert normalise(flat.train_images, flat).isfinite().all()


def test_what_a_model_sees_of_the_same_samples_is_in_their_fingerprint():
    more = [{}, {"augmentation": "zeros"}, {"mean": (0, 0, 0)}, {"std": (1, 1, 1)}]
    assert len({own_dataset(PARTS, **each).name for each in more}) == len(more)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({0: IMAGES[:20].astype(np.int64)}, "train_images: torch.int64; expected uint8"),
        ({0: IMAGES[:20, ..., :2]}, "(20, 20, 24, 2); expected (N, H, W)"),
        ({0: IMAGES[:0]}, "train_images: (0, 20, 24, 3); expected"),
        ({0: np.zeros((20, 3, 8, 3), np.uint8)}, "may have its channels first or last"),
        ({0: IMAGES[:20] * np.nan}, "train_images: NaN or infinite pixels"),
        ({2: IMAGES[20:, :10]}, "expected one size and one dtype"),
        ({1: LABELS[:19]}, "train_labels: 19 of them for 20 images"),
        ({1: LABELS[:20] / 2}, "train_labels: float64 (20,); expected (N,) integers or strings"),
        ({1: LABELS[:20] * 0}, "one class, 0; expected two or more"),
        ({3: LABELS[20:] + 1}, "test_labels: 3 is no class of the training set"),
        ({3: np.array(["a"] * 10)}, "expected one kind"),
    ],
)
def test_what_cannot_be_used_is_one_line(change, said):
    parts = [change.get(i, part) for i, part in enumerate(PARTS)]
    with pytest.raises(ValueError) as caught:
        own_dataset(parts)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [3, (1, 2), PARTS[:3], {"train": 1}, PARTS[:2]])
def test_what_is_no_data_at_all_is_refused(given):
    with pytest.raises(ValueError, match="data: a .*; expected .train_images, train_labels"):
        own_dataset(given)


def save(folder, label, name, array, mode=None, **options):
    (folder / label).mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(folder / label / name, **options)


@pytest.fixture
def folder(tmp_path):
    """Ten images of each of three classes."""
    for i, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        save(tmp_path, "cde"[label], f"{i:02d}.png", image)
    return tmp_path


def test_a_folder_of_class_folders_is_split_by_class_and_always_alike(folder):
    data = own_dataset(folder)
    assert data.class_names == ("c", "d", "e")
    assert torch.bincount(data.test_labels).tolist() == [2, 2, 2] and len(data.train_labels) == 24
    assert own_dataset(str(folder)).sha256 == data.sha256
    both = torch.cat([data.train_images, data.test_images]).permute(0, 2, 3, 1).flatten(1)
    assert sorted(map(tuple, both.tolist())) == sorted(map(tuple, IMAGES.reshape(30, -1).tolist()))


def test_train_and_test_folders_are_taken_as_they_are(folder, tmp_path):
    for part, chosen in (("train", slice(0, 20)), ("test", slice(20, 30))):
        for i, (image, label) in enumerate(zip(IMAGES[chosen], LABELS[chosen], strict=True)):
            save(tmp_path / "two" / part, "cde"[label], f"{i:02d}.png", image)
    assert torch.equal(own_dataset(tmp_path / "two").train_images, own_dataset(PARTS).train_images)


def test_black_and_white_and_palettes_are_converted_and_what_would_lose_something_is_refused(folder, tmp_path):
    usual, _ = read_images(folder)
    save(folder, "c", "00.png", IMAGES[0], "P")
    assert read_images(folder)[0].shape == usual.shape
    save(folder, "c", "00.png", IMAGES[0], "1")
    found = read_images(folder)[0][0]
    assert set(np.unique(found)) <= {0, 255} and found.shape == (20, 24, 3)
    for mode in ("RGBA", "I;16", "LA"):
        array = IMAGES[0, ..., 0].astype(np.uint16) if mode == "I;16" else IMAGES[0]
        save(folder, "c", "00.png", array, None if mode == "I;16" else mode)
        with pytest.raises(ValueError, match="00.png: mode .* is not taken"):
            own_dataset(folder)
    save(folder, "c", "00.png", IMAGES[0, :10])
    with pytest.raises(ValueError, match="01.png: 24 x 20 pixels, 00.png has 24 x 10; expected one size"):
        own_dataset(folder)
    (folder / "c" / "00.png").write_bytes(b"<html>")
    with pytest.raises(ValueError, match="00.png: cannot identify image file"):
        own_dataset(folder)
    with pytest.raises(ValueError, match="no images; expected"):
        own_dataset(tmp_path / "nowhere")


@pytest.mark.parametrize("model", ["lenet5", "alexnet", "resnet18"])
def test_a_run_on_own_data_is_told_apart_by_it_and_found_again(model, tmp_path):
    config = tiny_config(**{**RUN, "width": 0.1}, model=model)
    first = run(config, data=PARTS, results_dir=tmp_path, progress=False)
    other = run(config, data=(255 - IMAGES[:20], *PARTS[1:]), results_dir=tmp_path, progress=False)
    assert len(first) == len(other) == 1
    found = load_results(tmp_path)
    assert found["run_id"].nunique() == 2 and found["dataset"].str.match("own-[0-9a-f]{8}$").all()
    again = run(config, data=PARTS, results_dir=tmp_path, progress=False)
    assert again["seconds"].tolist() == first["seconds"].tolist()  # read, not computed
    for name in found["dataset"].unique():  # as in another process, which has no such data
        del DATASETS[name]
    assert load_results(tmp_path).equals(found)


def test_a_registered_name_stands_for_its_data_and_other_data_behind_it_is_refused(tmp_path):
    register_dataset("mine", lambda: PARTS)
    config = tiny_config(**RUN, dataset="mine")
    run(config, results_dir=tmp_path, progress=False)
    assert load_dataset("mine").name == "mine"
    register_dataset("mine", lambda: (255 - IMAGES[:20], *PARTS[1:]))
    with pytest.raises(ValueError, match="recorded with other data .*; use another results folder, or another name"):
        run(config, results_dir=tmp_path, progress=False)
    with pytest.raises(ValueError, match="is always there"):
        register_dataset("digits", lambda: PARTS)
    del DATASETS["mine"]
    assert load_results(tmp_path)["dataset"].tolist() == ["mine"]
