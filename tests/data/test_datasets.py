"""Laws of the data sets in memory: the embedded digits, fitting, normalisation, augmentation, the real files."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_files import cifar_arrays

from feddip_lite.data.datasets import (
    DATASETS,
    Dataset,
    as_published,
    augment,
    fit_images,
    hold_out,
    load_dataset,
    normalise,
)

FEDDIP_DATA = os.environ.get("FEDDIP_DATA")
needs_data = [pytest.mark.data, pytest.mark.skipif(not FEDDIP_DATA, reason="FEDDIP_DATA is not set")]


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def tiny(images, name="tiny", **changes):
    """A data set around `images`, normalised as asked."""
    labels = torch.zeros(len(images), dtype=torch.int64)
    values = {"scale": 255.0, "mean": (0.0,), "std": (1.0,), "augmentation": None, **changes}
    return Dataset(name, 1, images, labels, images, labels, **values, source="", sha256="", variant="")


def pixels(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def test_digits_are_split_1437_to_360_with_equal_shares_of_every_class(digits):
    assert digits.train_images.shape == (1437, 1, 28, 28)
    assert digits.test_images.shape == (360, 1, 28, 28)
    assert digits.train_images.dtype == torch.uint8
    assert digits.train_labels.dtype == torch.int64
    test = torch.bincount(digits.test_labels, minlength=10)
    total = test + torch.bincount(digits.train_labels, minlength=10)
    assert (test - total * 360 / 1797).abs().max() < 1


def test_digits_are_the_scikit_learn_images_enlarged_three_times_in_a_black_border(digits):
    from sklearn.datasets import load_digits

    images = torch.cat([digits.train_images, digits.test_images])[:, 0]
    assert images.max() == 16 == digits.scale
    border = torch.ones(28, 28, dtype=torch.bool)
    border[2:26, 2:26] = False
    assert not images[:, border].any()
    inner = images[:, 2:26, 2:26].reshape(-1, 8, 3, 8, 3)
    assert (inner == inner[:, :, :1, :, :1]).all()
    ours = sorted(image.tobytes() for image in inner[:, :, 0, :, 0].contiguous().numpy())
    assert ours == sorted(image.astype(np.uint8).tobytes() for image in load_digits().images)


def test_digits_checksum_is_pinned_because_recorded_results_name_it(digits):
    assert digits.sha256 == "7694dd5bbfbfa40db2df637358411bca00ba72d37c27f5155d239e8e95dca890"
    assert digits.variant == "embedded"
    assert "scikit-learn" in digits.source


def test_unknown_data_set_names_the_nearest_one():
    with pytest.raises(ValueError, match=r"'fashion-mnist'.*did you mean fashionmnist"):
        load_dataset("fashion-mnist")


def test_torchvision_and_scikit_learn_are_imported_by_the_data_sets_that_need_them_alone(tmp_path):
    np.savez(tmp_path / "cifar10.npz", **cifar_arrays())
    code = f"""
import sys, feddip_lite.data.datasets as datasets
def loaded(): return [name for name in ("sklearn", "torchvision") if name in sys.modules]
datasets.load_dataset("cifar10", {str(tmp_path)!r}); print(loaded())
datasets.load_dataset("digits"); print(loaded())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "['sklearn']"]


def test_to_moves_the_four_tensors_and_keeps_the_rest(digits):
    moved = digits.to("meta")
    assert {moved.train_images.device.type, moved.test_labels.device.type} == {"meta"}
    assert (moved.sha256, moved.mean, moved.classes) == (digits.sha256, digits.mean, digits.classes)


def test_fit_images_pads_around_the_centre_and_repeats_the_channel(digits):
    fitted = fit_images(digits, channels=3, size=32)
    assert fitted.train_images.shape == (1437, 3, 32, 32)
    assert fitted.train_images.dtype == torch.uint8
    assert torch.equal(fitted.test_images[:, :, 2:30, 2:30], digits.test_images.expand(-1, 3, -1, -1))
    assert fitted.test_images.sum(dtype=torch.int64) == 3 * digits.test_images.sum(dtype=torch.int64)


def test_fit_images_changes_nothing_when_they_fit_already(digits):
    assert torch.equal(fit_images(digits, channels=1, size=28).train_images, digits.train_images)


@pytest.mark.parametrize("height, width", [(40, 33), (33, 40), (20, 40)])
def test_larger_images_are_never_shrunk_but_made_square(height, width):
    images = pixels(2, 3, height, width)
    fitted = fit_images(tiny(images), channels=3, size=32).train_images
    assert fitted.shape == (2, 3, 40, 40)
    top, left = (40 - height) // 2, (40 - width) // 2
    assert torch.equal(fitted[:, :, top : top + height, left : left + width], images)
    assert fitted.sum(dtype=torch.int64) == images.sum(dtype=torch.int64)


@pytest.mark.parametrize("channels", [0, -1])
def test_fit_images_refuses_no_channels(digits, channels):
    with pytest.raises(ValueError, match="channels"):
        fit_images(digits, channels, 28)


def test_fit_images_refuses_to_drop_colours():
    with pytest.raises(ValueError, match="channels: .* expected an integer in .3, 3."):
        fit_images(tiny(pixels(2, 3, 8, 8)), channels=1, size=8)


def test_normalise_matches_numbers_by_hand():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    out = normalise(images, tiny(images, mean=(0.5, 0.1, 0.25), std=(0.5, 0.2, 0.5)))
    assert out.dtype == torch.float32
    assert out.flatten().tolist() == pytest.approx([-1.0, 0.5, 1.5])
    assert images.flatten().tolist() == [0, 51, 255]


def test_normalise_only_divides_by_the_maximum_when_mean_and_std_are_trivial(digits):
    assert torch.equal(normalise(digits.test_images, digits), digits.test_images / 16)
    three_channels = fit_images(digits, channels=3, size=32)
    assert normalise(three_channels.test_images, three_channels).max() == 1


def test_published_normalisation_of_cifar100_divides_mean_and_deviation_once_more_and_leaves_others_alone(digits):
    fixed = DATASETS["cifar100"]
    colours = tiny(pixels(5, 3, 6, 6), name="cifar100", mean=fixed["mean"], std=fixed["std"], scale=255.0)
    images = colours.train_images
    published = {"mean": (0.507, 0.487, 0.441), "std": (0.267, 0.256, 0.276)}  # datasets_models.py, three digits
    mean, std = (torch.tensor(published[key], dtype=torch.float64).view(3, 1, 1) for key in ("mean", "std"))
    expected = (images.double() - mean) / std  # (x / 255 - mean / 255) / (std / 255)
    torch.testing.assert_close(normalise(images, as_published(colours)).double(), expected, rtol=1e-6, atol=1e-5)
    assert as_published(digits) is digits


def test_normalise_refuses_another_number_of_channels():
    images = pixels(2, 1, 8, 8)
    with pytest.raises(ValueError, match="3 channels"):
        normalise(images, tiny(images, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0)))


def oracle(images, padding):
    """All 162 possible outputs for each image, by torch's own padding: (162, b, C, H, W)."""
    mode = {"zeros": "constant", "reflect": "reflect"}[padding]
    padded = F.pad(images.float(), (4, 4, 4, 4), mode=mode).to(torch.uint8)
    height, width = images.shape[2:]
    crops = [padded[:, :, y : y + height, x : x + width] for y in range(9) for x in range(9)]
    return torch.stack([view for crop in crops for view in (crop, crop.flip(3))])


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 5, 9)])
def test_augment_shows_each_image_as_one_of_its_162_padded_crops_and_flips(padding, shape):
    images = pixels(400, *shape)
    out = augment(images, padding, torch.Generator().manual_seed(0))
    assert out.dtype == torch.uint8
    assert out.shape == images.shape
    matches = (oracle(images, padding) == out).flatten(2).all(2)
    assert matches.any(0).all()
    assert matches.any(1).sum() > 130  # of 162 choices, 148 are expected to turn up in 400 uniform draws


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
def test_augment_draws_from_its_generator_only(padding):
    images = pixels(64, 3, 8, 8)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = augment(images, padding, torch.Generator().manual_seed(7))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, augment(images, padding, torch.Generator().manual_seed(7)))
    assert not torch.equal(first, augment(images, padding, torch.Generator().manual_seed(8)))
    assert torch.equal(images, pixels(64, 3, 8, 8))


def test_augment_is_uniform_over_offsets_and_flips():
    row, column = torch.arange(1, 10).view(9, 1) * 10, torch.arange(1, 10)
    images = (row + column).to(torch.uint8).expand(16_200, 1, 9, 9)
    centre = augment(images, "zeros", torch.Generator().manual_seed(0))[:, 0, 4, 4]
    times = torch.bincount(centre, minlength=100)
    assert (times > 0).sum() == 81  # the centre pixel shows each of the 81 offsets ...
    assert times[times > 0].float().sub(200).abs().max() < 5 * 200**0.5  # ... equally often
    flipped = augment(torch.arange(9, dtype=torch.uint8).expand(2000, 1, 9, 9), "reflect", torch.Generator())
    assert 900 < (flipped[:, 0, 0, 4] > flipped[:, 0, 0, 5]).sum() < 1100


def test_augment_without_padding_returns_the_images_and_draws_nothing():
    images, generator = pixels(4, 1, 8, 8), torch.Generator().manual_seed(0)
    state = generator.get_state()
    assert augment(images, None, generator) is images
    assert torch.equal(generator.get_state(), state)


def test_augment_accepts_an_empty_batch_and_strided_images():
    generator = torch.Generator().manual_seed(0)
    assert augment(pixels(0, 3, 8, 8), "zeros", generator).shape == (0, 3, 8, 8)
    strided = pixels(4, 8, 8, 3).permute(0, 3, 1, 2)
    same = augment(strided.contiguous(), "reflect", torch.Generator().manual_seed(5))
    assert torch.equal(augment(strided, "reflect", torch.Generator().manual_seed(5)), same)


@pytest.mark.parametrize("padding, size", [("mirror", 8), ("reflect", 4), ("", 8)])
def test_augment_refuses_unknown_padding_and_images_too_small_to_reflect(padding, size):
    with pytest.raises(ValueError, match="padding must be"):
        augment(pixels(2, 1, size, size), padding, torch.Generator())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("padding", ["zeros", "reflect"])
def test_one_cpu_generator_gives_the_same_crops_on_the_gpu(padding):
    images = pixels(64, 3, 32, 32)
    here = augment(images, padding, torch.Generator().manual_seed(0))
    there = augment(images.cuda(), padding, torch.Generator().manual_seed(0))
    assert torch.equal(there.cpu(), here)
    data = tiny(images, mean=(0.1, 0.2, 0.3), std=(0.2, 0.3, 0.4))
    torch.testing.assert_close(normalise(there, data).cpu(), normalise(here, data))


class TestRealFiles:
    pytestmark = needs_data

    @pytest.mark.parametrize(
        "name, classes, shape, train",
        [
            ("fashionmnist", 10, (1, 28, 28), 60_000),
            ("cifar10", 10, (3, 32, 32), 50_000),
            ("cifar100", 100, (3, 32, 32), 50_000),
        ],
    )
    def test_a_real_data_set_has_its_sizes_and_equally_many_images_per_class(self, name, classes, shape, train):
        data = load_dataset(name)
        assert data.train_images.shape == (train, *shape)
        assert data.test_images.shape == (10_000, *shape)
        assert set(torch.bincount(data.train_labels).tolist()) == {train // classes}
        assert set(torch.bincount(data.test_labels).tolist()) == {10_000 // classes}
        assert data.classes == classes
        assert data.train_images.is_contiguous()
        if len(data.mean) == 3:  # otherwise the authors divide only
            images = normalise(data.train_images, data)
            assert images.mean((0, 2, 3)).abs().max() < 5e-3  # a re-split moves the mean by 0.0025
            assert (images.std((0, 2, 3)) - 1).abs().max() < 5e-3

    def test_fashion_mnist_is_official(self):
        assert load_dataset("fashionmnist").variant == "official"

    def test_a_repacked_cifar100_says_that_it_is_a_re_split(self):
        data = load_dataset("cifar100")
        assert ("re-split" in data.source) == (data.variant == "packed")


# ---- held-out training samples


def test_held_out_samples_are_a_share_of_each_class_and_the_rest_is_left(digits):
    held = hold_out(digits, 0.25, torch.Generator().manual_seed(3))
    labels = digits.train_labels
    for label in range(digits.classes):
        count = int((labels == label).sum())
        assert int((held.test_labels == label).sum()) == round(0.25 * count)
        assert int((held.train_labels == label).sum()) == count - round(0.25 * count)
    both = torch.cat([held.train_images, held.test_images]).flatten(1).tolist()
    assert sorted(both) == sorted(digits.train_images.flatten(1).tolist())


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_holding_out_nothing_or_all_of_a_class_is_refused(digits, share):
    with pytest.raises(ValueError, match=f"validation: {share} is not valid; class 0 has"):
        hold_out(digits, share, torch.Generator())
