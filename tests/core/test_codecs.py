"""Laws of the codecs: what they lose on average and at worst, how many bytes they make, and what they refuse."""

from math import ceil, sqrt

import numpy as np
import pytest
import torch

from feddip_lite.core.codecs import CODECS, QSGD, Fp16, Fp32, Sign, Ternary, TopK, codec_of
from feddip_lite.core.errors import Diverged

ALL = [Fp32(), Fp16(), *(QSGD(bits, 32) for bits in (2, 5, 8, 11, 16)), Ternary(32), TopK(0.1), Sign()]
UNBIASED = [codec for codec in ALL if codec.unbiased]
SIZES = (0, 1, 7, 31, 32, 33, 100, 1000)


def vector(size, seed=0):
    """Numbers of many magnitudes, some of them 0."""
    rng = np.random.default_rng(seed)
    numbers = rng.standard_normal(size) * 10.0 ** rng.integers(-3, 3, size) * (rng.random(size) < 0.9)
    return torch.from_numpy(numbers.astype(np.float32))


def sent(codec, x, seed=0):
    return codec.decode(codec.encode(x, np.random.default_rng(seed)), len(x))


def squares(x):
    return float(x.double().square().sum())


class Even:
    """In place of a generator: `steps` draws, evenly spread over [0, 1), one after the other, alike for all numbers."""

    def __init__(self, steps):
        self.draws = iter((np.arange(steps) + 0.5) / steps)

    def random(self, shape, dtype):
        return np.full(shape, next(self.draws), dtype)


def over_all_draws(codec, x, steps=256):
    """C(x) for each of `steps` even draws of one block: (steps, d) float64. Their mean is the expectation."""
    draws = Even(steps)
    return torch.stack([codec.decode(codec.encode(x, draws), len(x)) for _ in range(steps)]).double()


@pytest.mark.parametrize("codec", ALL, ids=lambda codec: codec.name)
def test_a_name_says_all_of_a_codec_and_what_is_left_out_is_the_default(codec):
    assert codec_of(codec.name) == codec
    assert codec_of(codec.kind) == CODECS[codec.kind]()


@pytest.mark.parametrize("codec", ALL, ids=lambda codec: codec.name)
@pytest.mark.parametrize("size", SIZES)
def test_as_many_numbers_come_back_and_the_same_draws_give_the_same_bytes(codec, size):
    x = vector(size)
    data = codec.encode(x, np.random.default_rng(3))
    back = codec.decode(data, size)
    assert back.shape == (size,) and back.dtype == torch.float32 and back.isfinite().all()
    assert codec.encode(x.clone(), np.random.default_rng(3)) == data


@pytest.mark.parametrize("size", SIZES)
def test_fp32_and_the_whole_of_topk_lose_nothing(size):
    x = vector(size)
    assert torch.equal(sent(Fp32(), x), x)
    assert torch.equal(sent(TopK(1.0), x), x)


@pytest.mark.parametrize("codec", UNBIASED, ids=lambda codec: codec.name)
def test_the_expectation_is_the_vector(codec):
    """Over 1024 even draws the mean is right to half a draw of one level, and to float32's own rounding."""
    x = vector(32, seed=1)
    level = float(x.abs().max()) / getattr(codec, "levels", 1) if codec.kind != "ternary" else sqrt(squares(x))
    error = (over_all_draws(codec, x, 1024).mean(0) - x.double()).abs().max()
    assert error <= level / 2048 + float(x.abs().max()) * 2**-22


@pytest.mark.parametrize("codec", [QSGD(8, 512), QSGD(4, 64), QSGD(2, 16), Ternary(512)], ids=lambda codec: codec.name)
def test_the_mean_of_many_messages_comes_near_the_vector_as_omega_says(codec):
    """E ||mean of M - x||^2 <= omega ||x||^2 / M; four times that is passed less than once in four by Markov alone, and
    here, where d = 2000 errors add up, practically never."""
    x, many = vector(2000, seed=2), 100
    mean = sum(sent(codec, x, seed).double() for seed in range(many)) / many
    assert squares(mean - x.double()) <= 4 * max(codec.omega, 1e-6) * squares(x) / many


@pytest.mark.parametrize("codec", [QSGD(8, 512), QSGD(4, 64), QSGD(3, 9), QSGD(2, 64)], ids=lambda codec: codec.name)
def test_omega_of_qsgd_is_reached_where_one_number_is_large_and_all_others_alike(codec):
    s, ratio = codec.levels, (codec.block - 1) / codec.levels**2
    y = (sqrt(1 + ratio) - 1) / ratio  # of a level: maximises y (1 - y) / (s^2 / (block - 1) + y^2)
    x = torch.full((codec.block,), y / s)
    x[0] = 1.0
    lost = (over_all_draws(codec, x, 1024) - x.double()).square().sum(1).mean()
    assert float(lost) / squares(x) == pytest.approx(codec.omega, rel=5e-3)


@pytest.mark.parametrize("block", [1, 4, 64, 512])
def test_omega_of_ternary_is_reached_where_all_magnitudes_are_alike(block):
    x = torch.ones(block) * torch.where(torch.arange(block) % 3 == 0, -0.7, 0.7)
    lost = (over_all_draws(Ternary(block), x, 1024) - x.double()).square().sum(1).mean()
    assert float(lost) / squares(x) == pytest.approx(Ternary(block).omega, rel=2e-2, abs=1e-6)


@pytest.mark.parametrize("codec", UNBIASED, ids=lambda codec: codec.name)
@pytest.mark.parametrize("seed", range(2))
def test_no_vector_loses_more_than_omega(codec, seed):
    x = vector(32, seed)
    lost = (over_all_draws(codec, x) - x.double()).square().sum(1).mean()
    assert float(lost) <= codec.omega * squares(x) * (1 + 1e-2) + 1e-12 * squares(x)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 1.0])
def test_topk_contracts_by_its_share_and_is_tight_where_all_magnitudes_are_alike(share):
    codec = TopK(share)
    for seed in range(5):
        x = vector(100, seed)
        assert squares(sent(codec, x) - x) <= (1 - share) * squares(x) * (1 + 1e-6)
    ones = torch.ones(100)
    assert squares(sent(codec, ones) - ones) == pytest.approx(100 * (1 - share))


def test_topk_keeps_the_largest_of_any_size_at_least_one_and_ties_by_position():
    assert [TopK(0.01).kept(size) for size in (0, 1, 100, 101)] == [0, 1, 1, 2]
    assert TopK(0.07).kept(100) == 7  # 0.07 * 100 is 7.000000000000001
    assert sent(TopK(0.5), torch.tensor([1.0, -3.0, 2.0, -2.0])).tolist() == [0.0, -3.0, 2.0, 0.0]


@pytest.mark.parametrize("seed", range(5))
def test_sign_contracts_by_the_ratio_of_norms(seed):
    x = vector(200, seed)
    alpha = float(x.double().abs().sum()) ** 2 / (200 * squares(x))
    assert squares(sent(Sign(), x) - x) == pytest.approx((1 - alpha) * squares(x), rel=1e-5)
    assert alpha >= 1 / 200


def test_fp16_is_the_nearest_half_precision_number():
    x = vector(1000)
    error = (sent(Fp16(), x) - x).double().abs()
    assert (error <= (x.double().abs() * 2**-11).clamp_min(2**-25)).all()


@pytest.mark.parametrize("codec", ALL, ids=lambda codec: codec.name)
@pytest.mark.parametrize("size", SIZES)
def test_zeros_stay_zeros(codec, size):
    assert not sent(codec, torch.zeros(size)).any()


@pytest.mark.parametrize("codec", [QSGD(8, 32), QSGD(2, 32), QSGD(16, 5), Sign()], ids=lambda codec: codec.name)
@pytest.mark.parametrize("number", [1.0, 0.1, 1e-30, 3e38, 1e-44])
def test_blocks_of_one_magnitude_come_back_as_they_were(codec, number):
    x = torch.tensor([number, -number] * 40)
    assert torch.equal(sent(codec, x), x)


@pytest.mark.parametrize("block", [1, 7, 1000])
@pytest.mark.parametrize("bits", range(2, 17))
def test_a_block_of_qsgd_is_no_further_away_than_a_level_and_is_as_long_as_it_says(bits, block):
    codec, x = QSGD(bits, block), vector(203)
    data = codec.encode(x, np.random.default_rng(0))
    whole, rest = divmod(bits, 8)
    assert len(data) == 4 * ceil(203 / block) + 203 * whole + ceil(203 / 8) * rest
    back = codec.decode(data, 203)
    for part, found in zip(x.split(block), back.split(block), strict=True):
        assert (part - found).abs().max() <= part.abs().max() / codec.levels * (1 + 1e-5)


def test_lengths_are_those_that_the_docs_tell():
    draw, x = np.random.default_rng(0), vector(51200, seed=4).sign() * torch.randn(51200).abs()
    sizes = {codec.name: len(codec.encode(x, draw)) for codec in (Fp32(), Fp16(), QSGD(8, 512), Sign())}
    assert sizes == {"fp32": 204_800, "fp16": 102_400, "qsgd:8:512": 51_600, "sign": 6_404}
    assert 8 * (len(Ternary(512).encode(x, draw)) - 400) / 51200 < 0.31  # bits a number, beside its norms
    assert 8 * len(TopK(0.01).encode(x, draw)) / 512 < 32 + 9


@pytest.mark.parametrize("codec", ALL, ids=lambda codec: codec.name)
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused(codec, number):
    x = vector(100)
    x[70] = number
    with pytest.raises(Diverged, match="values: NaN or infinite"):
        codec.encode(x, np.random.default_rng(0))


@pytest.mark.parametrize(("codec", "number"), [(Fp16(), 1e5), (Ternary(32), 3e38)], ids=["fp16", "ternary"])
def test_what_is_beyond_the_range_of_the_form_is_refused(codec, number):
    with pytest.raises(Diverged, match="beyond the range of"):
        codec.encode(torch.full((32,), number), np.random.default_rng(0))


def damaged(data):
    """`data` cut, with more behind, and with any one of its bytes changed."""
    yield from (data[:-1], data[: len(data) // 2], b"", data + b"\0")
    for place in range(len(data)):
        for mask in (1, 255):
            yield data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :]


@pytest.mark.parametrize("codec", ALL, ids=lambda codec: codec.name)
def test_damaged_bytes_give_finite_numbers_or_one_clear_line(codec):
    refused = 0
    for data in damaged(codec.encode(vector(50), np.random.default_rng(0))):
        try:
            back = codec.decode(data, 50)
            assert back.shape == (50,) and back.isfinite().all()
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and str(error)
    assert refused >= 4


@pytest.mark.parametrize("codec", ALL, ids=lambda codec: codec.name)
def test_any_bytes_at_all_raise_nothing_but_value_errors(codec):
    rng = np.random.default_rng(5)
    for size in range(120):
        try:
            codec.decode(rng.bytes(size), 24)
        except ValueError as error:
            assert "\n" not in str(error)


BYTES = {
    "too few": (QSGD(8, 4), bytes(5), 4, "5 bytes, must be 8"),
    "a scale that is NaN": (QSGD(8, 4), b"\0\0\xc0\x7f" + bytes(4), 4, "NaN or infinite"),
    "a scale below 0": (QSGD(8, 4), b"\0\0\x80\xbf" + bytes(4), 4, "scale below 0"),
    "a level too high": (QSGD(8, 4), bytes(4) + b"\xff" * 4, 4, "level 255, must be at most 254"),
    "bits after the last code": (QSGD(4, 4), bytes(4) + bytes([0, 0, 0, 1]), 4, "bits after the last"),
    "bits after the last sign": (Sign(), bytes(4) + b"\1", 4, "bits after the last sign"),
    "no positions": (TopK(0.5), b"", 4, "too few for its positions"),
    "positions beyond the end": (TopK(0.5), b"\xff" * 8, 4, "too few for its positions"),
}


@pytest.mark.parametrize("what", BYTES)
def test_what_is_wrong_with_bytes_is_said(what):
    codec, data, count, reason = BYTES[what]
    with pytest.raises(ValueError, match=reason):
        codec.decode(data, count)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "expected fp32, fp16, qsgd"), ("gzip", "expected fp32"), ("fp32:8", "expected fp32"),
        ("qsgd:1", r"bits: 1 is not valid; expected an integer in \[2, 16\]"), ("qsgd:17", "bits: 17"),
        ("qsgd:8.5", "bits: 8.5"), ("qsgd:8:0", "block: 0"), ("qsgd:8:512:1", "expected fp32"),
        ("ternary:0", "block: 0"), ("topk:0", r"share: 0 is not valid; expected a number in \(0, 1\]"),
        ("topk:1.5", "share: 1.5"), ("topk:nan", "share"), ("topk:0.123456789", "at most six digits"),
    ],
)  # fmt: skip
def test_a_codec_that_is_none_is_refused_with_its_number_and_range(name, reason):
    with pytest.raises(ValueError, match=reason):
        codec_of(name)
