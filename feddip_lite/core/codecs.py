"""Codecs: a vector in fewer bytes than four per number, and what they lose, as laws that tests hold them to.

    x in R^d,  C(x) = decode(encode(x)):    unbiased:     E C(x) = x,   E ||C(x) - x||^2 <= omega ||x||^2
                                            contractive:  ||C(x) - x||^2 <= (1 - alpha) ||x||^2, alpha > 0

`fp32` loses nothing, `fp16` rounds; `qsgd` and `ternary` round at random, so that the mean over many is right; `topk`
and `sign` are biased and need feedback. Names are `fp32`, `fp16`, `qsgd:BITS:BLOCK`, `ternary:BLOCK`, `topk:SHARE`,
`sign`. What is coded, and when: `train/transport.py`.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from math import ceil, sqrt
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .errors import Diverged
from .message import bits_of_code, code_of_bits
from .settings import Check, accepted, integer, read_value, real, setting, validate
from .sparsity import topk_mask

_LENGTH = struct.Struct("<I")
_PIECE = 2**14  # numbers worked on at a time: what is made of them fits into a core's cache, and malloc maps no pages


@dataclass(frozen=True)
class Codec(ABC):
    """`encode(vector, generator)` gives the bytes of a float32 vector (d,), on any device; `decode(data, count)` the
    vector (count,), on the CPU. The same vector and generator give the same bytes.

    Raises:
        Diverged: NaN, infinity, or a number too large for the form, in a vector. ValueError: bytes that `encode` does
            not make of `count` numbers; one line.
    """

    kind: ClassVar[str]
    unbiased: ClassVar[bool] = False

    def __post_init__(self) -> None:
        validate(self)

    @property
    def name(self) -> str:
        """As in YAML, on the command line and in messages; `codec_of` has the codec back."""
        numbers = [f"{value:g}" if isinstance(value, float) else str(value) for value in astuple(self)]
        return ":".join([self.kind, *numbers])

    @property
    def omega(self) -> float:
        """The largest E ||C(x) - x||^2 / ||x||^2 of an unbiased codec; 0 for those that draw nothing. From 1 on what is
        lost may outgrow what is sent, and no feedback converges."""
        return 0.0

    @abstractmethod
    def encode(self, vector: Tensor, generator: np.random.Generator) -> bytes: ...

    @abstractmethod
    def decode(self, data: bytes | memoryview, count: int) -> Tensor: ...


@dataclass(frozen=True)
class Fp32(Codec):
    """The numbers themselves."""

    kind = "fp32"
    unbiased = True

    def encode(self, vector: Tensor, generator: np.random.Generator) -> bytes:
        return _finite(_numbers(vector)).astype("<f4", copy=False).tobytes()

    def decode(self, data: bytes | memoryview, count: int) -> Tensor:
        _require_length(self, data, 4 * count)
        return torch.from_numpy(_finite_read(self, np.frombuffer(data, "<f4")).astype(np.float32))


@dataclass(frozen=True)
class Fp16(Codec):
    """The nearest half-precision numbers: relative error at most 2^-11 from 2^-14 on, absolute 2^-25 below."""

    kind = "fp16"

    def encode(self, vector: Tensor, generator: np.random.Generator) -> bytes:
        with np.errstate(over="ignore"):
            return _finite(_numbers(vector).astype("<f2"), "of fp16").tobytes()

    def decode(self, data: bytes | memoryview, count: int) -> Tensor:
        _require_length(self, data, 2 * count)
        return torch.from_numpy(_finite_read(self, np.frombuffer(data, "<f2")).astype(np.float32))


@dataclass(frozen=True)
class QSGD(Codec):
    """Stochastic rounding to s = 2^(bits-1) - 1 levels on either side of zero, per block of numbers:

        C(x)_i = ||x||_inf / s * (floor(y_i) + [u_i < y_i - floor(y_i)]),   y_i = s x_i / ||x||_inf,   u_i uniform.

    Unbiased; omega = (sqrt(1 + (block - 1) / s^2) - 1) / 2, reached where one number is large and all others alike.
    Bytes: a float32 scale per block, then the levels, `bits` each.
    Deviation: scaled by the largest magnitude, where Alistarh et al. have the 2-norm in their analysis (and omega at
    most min(d/s^2, sqrt(d)/s)): all levels are used then, and the worst error is smaller.
    Source: Alistarh et al., NIPS 2017, arXiv 1610.02132, with its blocks ("buckets").
    """

    kind = "qsgd"
    unbiased = True

    bits: int = setting(8, integer(2, 16), "of a number")
    block: int = setting(512, integer(1, 2**31 - 1), "numbers that share a scale")

    @property
    def levels(self) -> int:
        """s, the levels on either side of zero."""
        return 2 ** (self.bits - 1) - 1

    @property
    def omega(self) -> float:
        return (sqrt(1 + (self.block - 1) / self.levels**2) - 1) / 2

    def encode(self, vector: Tensor, generator: np.random.Generator) -> bytes:
        x, s = _numbers(vector), np.float32(self.levels)
        scales = np.empty(ceil(len(x) / self.block), np.float32)
        codes = np.empty(len(x), np.uint8 if self.bits <= 8 else np.uint16)
        for where, blocks, width in _pieces(len(x), self.block):
            rows = x[where].reshape(-1, width)
            scale = scales[blocks] = _finite(np.abs(rows).max(1))
            y = rows / np.where(scale, scale, 1)[:, None] * s
            low = np.floor(y)
            y -= low
            low += generator.random(rows.shape, np.float32) < y
            low += s
            codes[where] = low.reshape(-1)
        return scales.astype("<f4", copy=False).tobytes() + _packed(codes, self.bits)

    def decode(self, data: bytes | memoryview, count: int) -> Tensor:
        blocks, s = ceil(count / self.block), self.levels
        _require_length(self, data, 4 * blocks + _packed_length(count, self.bits))
        scales, codes = _scales_of(self, data, blocks), _unpacked(data[4 * blocks :], count, self.bits)
        if count and codes.max() > 2 * s:
            raise ValueError(f"{self.name}: level {codes.max()}, must be at most {2 * s}")
        values, result = (np.arange(-s, s + 1) / s).astype(np.float32), np.empty(count, np.float32)
        for where, which, width in _pieces(count, self.block):
            rows = result[where].reshape(-1, width)
            np.take(values, codes[where].reshape(-1, width), out=rows)
            rows *= scales[which, None]
        return torch.from_numpy(result)


@dataclass(frozen=True)
class Ternary(Codec):
    """Zero or plus or minus the 2-norm of its block, at random: P(C(x)_i != 0) = |x_i| / ||x||_2.

    Unbiased; omega = sqrt(block) - 1, reached where all magnitudes are alike. At most sqrt(block) numbers of a block
    are not zero, in expectation; so little that their positions are coded: .3 bits a number at block 512.
    Bytes: a float32 norm per block, the length of the mask code (uint32), the code of the positions, as that of a mask
    in a message, then a sign bit each. Source: QSGD with s = 1.
    """

    kind = "ternary"
    unbiased = True

    block: int = setting(512, integer(1, 2**31 - 1), "numbers that share a norm")

    @property
    def omega(self) -> float:
        return sqrt(self.block) - 1

    def encode(self, vector: Tensor, generator: np.random.Generator) -> bytes:
        x = _numbers(vector)
        norms, chosen = np.empty(ceil(len(x) / self.block), np.float32), np.empty(len(x), np.bool_)
        for where, blocks, width in _pieces(len(x), self.block):
            rows = np.abs(x[where].reshape(-1, width))
            squares = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)  # those of small numbers must not vanish
            with np.errstate(over="ignore"):
                norm = norms[blocks] = _finite(np.sqrt(squares).astype(np.float32), "of float32")
            rows /= np.where(norm, norm, 1)[:, None]
            chosen[where] = (generator.random(rows.shape, np.float32) < rows).reshape(-1)
        return norms.astype("<f4", copy=False).tobytes() + _placed(chosen) + np.packbits(x[chosen] < 0).tobytes()

    def decode(self, data: bytes | memoryview, count: int) -> Tensor:
        blocks = ceil(count / self.block)
        norms, (chosen, rest) = _scales_of(self, data, blocks), _places_of(self, data[4 * blocks :], count)
        where, result = np.flatnonzero(chosen), np.zeros(count, np.float32)
        result[where] = norms[where // self.block] * _signs_of(self, rest, len(where))
        return torch.from_numpy(result)


@dataclass(frozen=True)
class TopK(Codec):
    """The ceil(share * d) numbers of largest magnitude, ties by position; all others are 0.

    Contractive with alpha = share, more or less a number. Bytes: length and code of the positions, as of a mask in a
    message, then the numbers, float32. Source: Stich et al., NeurIPS 2018, arXiv 1809.07599.
    """

    kind = "topk"

    share: float = setting(0.01, real("(0, 1]"), "of the numbers, that travel")

    def __post_init__(self) -> None:
        super().__post_init__()
        if float(f"{self.share:g}") != self.share:
            raise ValueError(f"share: {self.share!r} is not valid; expected a number of at most six digits")

    def kept(self, count: int) -> int:
        """How many of `count` numbers travel: at least one, if there is any."""
        return max(min(count, 1), ceil(round(self.share * count, 6)))  # .07 * 100 is 7.000000000000001

    def encode(self, vector: Tensor, generator: np.random.Generator) -> bytes:
        x = _finite(_numbers(vector))
        chosen = topk_mask(torch.from_numpy(x).abs(), self.kept(len(x))).numpy()
        return _placed(chosen) + x[chosen].astype("<f4", copy=False).tobytes()

    def decode(self, data: bytes | memoryview, count: int) -> Tensor:
        chosen, rest = _places_of(self, data, count)
        if (found := int(np.count_nonzero(chosen))) != self.kept(count):
            raise ValueError(f"{self.name}: {found} positions of {count}, must be {self.kept(count)}")
        _require_length(self, rest, 4 * found)
        result = np.zeros(count, np.float32)
        result[chosen] = _finite_read(self, np.frombuffer(rest, "<f4"))
        return torch.from_numpy(result)


@dataclass(frozen=True)
class Sign(Codec):
    """The mean magnitude with each number's sign, plus for 0.

    Contractive with alpha = ||x||_1^2 / (d ||x||_2^2), at least 1/d. Bytes: the mean, float32, then a bit a number.
    Source: Karimireddy et al., ICML 2019, arXiv 1901.09847.
    """

    kind = "sign"

    def encode(self, vector: Tensor, generator: np.random.Generator) -> bytes:
        x = _finite(_numbers(vector))
        mean = np.abs(x).mean(dtype=np.float64) if len(x) else 0.0
        return np.array([mean], "<f4").tobytes() + np.packbits(x < 0).tobytes()

    def decode(self, data: bytes | memoryview, count: int) -> Tensor:
        return torch.from_numpy(_scales_of(self, data, 1) * _signs_of(self, data[4:], count))


CODECS: dict[str, type[Codec]] = {codec.kind: codec for codec in (Fp32, Fp16, QSGD, Ternary, TopK, Sign)}


def codec_of(name: str) -> Codec:
    """The codec of a name; numbers left out have their default, so that "qsgd" is "qsgd:8:512".

    Raises:
        ValueError: no such codec, or a number outside its range; says which.
    """
    kind, *numbers = name.split(":")
    if kind not in CODECS or len(numbers) > len(fields(CODECS[kind])):
        raise ValueError(f"codec: {name!r} is not valid; expected {EXPECTED}")
    items = fields(CODECS[kind])
    return CODECS[kind](*(accepted(item, read_value(number)) for item, number in zip(items, numbers, strict=False)))


EXPECTED = (
    "fp32, fp16, qsgd:BITS:BLOCK (2 to 16 bits, a block of at least 1), ternary:BLOCK, topk:SHARE in (0, 1], or sign"
)


def named_codec() -> Check:
    """A codec's name, in full."""

    def accept(value):
        try:
            return codec_of(value).name if isinstance(value, str) else None
        except ValueError:
            return None

    return Check(EXPECTED, accept)


def _numbers(vector: Tensor) -> np.ndarray:
    return vector.detach().cpu().contiguous().numpy()


def _pieces(count: int, block: int) -> Iterator[tuple[slice, slice, int]]:
    """(numbers, blocks, numbers in each of these blocks), piece after piece; the last block may be short."""
    whole, step = count // block, max(1, _PIECE // block)
    for first in range(0, whole, step):
        last = min(first + step, whole)
        yield slice(first * block, last * block), slice(first, last), block
    if count % block:
        yield slice(whole * block, count), slice(whole, whole + 1), count % block


def _finite(numbers: np.ndarray, of: str = "") -> np.ndarray:
    if not np.isfinite(numbers).all():
        raise Diverged(f"values: NaN or infinite{f', or beyond the range {of}' * bool(of)}; they cannot be coded")
    return numbers


def _finite_read(codec: Codec, numbers: np.ndarray) -> np.ndarray:
    if not np.isfinite(numbers).all():
        raise ValueError(f"{codec.name}: NaN or infinite numbers")
    return numbers


def _require_length(codec: Codec, data: bytes | memoryview, length: int) -> None:
    if len(data) != length:
        raise ValueError(f"{codec.name}: {len(data)} bytes, must be {length}")


def _scales_of(codec: Codec, data: bytes | memoryview, count: int) -> np.ndarray:
    """The `count` float32 that `data` begins with, none of them below 0."""
    if len(data) < 4 * count:
        raise ValueError(f"{codec.name}: {len(data)} bytes, must be at least {4 * count}")
    scales = _finite_read(codec, np.frombuffer(data[: 4 * count], "<f4").astype(np.float32))
    if np.signbit(scales).any():
        raise ValueError(f"{codec.name}: a scale below 0")
    return scales


def _placed(chosen: np.ndarray) -> bytes:
    code = code_of_bits(np.packbits(chosen).tobytes(), len(chosen))
    return _LENGTH.pack(len(code)) + code


def _places_of(codec: Codec, data: bytes | memoryview, count: int) -> tuple[np.ndarray, memoryview]:
    """What `_placed` coded: (count,) bool, and what follows it."""
    view = memoryview(data)
    stop = _LENGTH.size + (_LENGTH.unpack_from(view)[0] if len(view) >= _LENGTH.size else 0)
    if len(view) < stop:
        raise ValueError(f"{codec.name}: {len(view)} bytes are too few for its positions")
    return bits_of_code(view[_LENGTH.size : stop], count).numpy(), view[stop:]


def _signs_of(codec: Codec, data: bytes | memoryview, count: int) -> np.ndarray:
    """(count,) float32, 1 or -1, of a bit each."""
    _require_length(codec, data, ceil(count / 8))
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    if bits[count:].any():
        raise ValueError(f"{codec.name}: bits after the last sign")
    return 1 - 2 * bits[:count].astype(np.float32)


def _packed_length(count: int, bits: int) -> int:
    whole, rest = divmod(bits, 8)
    return whole * count + ceil(count / 8) * rest


def _packed(codes: np.ndarray, bits: int) -> bytes:
    """`codes` (count,), each below 2^bits, in `bits` bits each: the low byte of all, then the bits that are left, eight
    codes in as many bytes as these are bits, the first code lowest."""
    parts = []
    while bits >= 8:
        parts.append(codes.astype(np.uint8).tobytes())
        codes, bits = codes >> 8, bits - 8
    if bits:
        octets = np.zeros((ceil(len(codes) / 8), 8), np.uint8)
        octets.reshape(-1)[: len(codes)] = codes
        words = np.zeros(len(octets), "<u8")
        for place in range(8):
            words |= octets[:, place].astype("<u8") << np.uint64(bits * place)
        parts.append(words.view(np.uint8).reshape(-1, 8)[:, :bits].tobytes())
    return b"".join(parts)


def _unpacked(data: bytes | memoryview, count: int, bits: int) -> np.ndarray:
    """The inverse of `_packed`: (count,) uint8 up to 8 bits, else uint16."""
    raw, codes = np.frombuffer(data, np.uint8), np.zeros(count, np.uint8 if bits <= 8 else np.uint16)
    shift = 0
    while bits - shift >= 8:
        codes |= raw[:count].astype(codes.dtype) << codes.dtype.type(shift)
        raw, shift = raw[count:], shift + 8
    if left := bits - shift:
        padded = np.zeros((ceil(count / 8), 8), np.uint8)
        padded[:, :left] = raw.reshape(-1, left)
        words, octets = padded.view("<u8").reshape(-1), np.empty(padded.shape, codes.dtype)
        for place in range(8):
            octets[:, place] = (words >> np.uint64(left * place)) & np.uint64(2**left - 1)
        if octets.reshape(-1)[count:].any():
            raise ValueError(f"codes of {bits} bits: bits after the last")
        codes |= octets.reshape(-1)[:count] << codes.dtype.type(shift)
    return codes
