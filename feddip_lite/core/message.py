"""What travels between server and client: `Message`, its exact binary form, and its size in bytes.

    header     magic "FDIP", version, flags, number of extras, of values, of mask weights, bytes of mask code
    values     float32 each
    mask code  one kind byte, then a raw deflate stream of a bitmap or of gaps
    extras     in order of name: name length, name, dtype code, count, elements
    CRC-32     of everything before it

Everything is little-endian. `num_bytes` is the length of that form: the cost columns of every result are its sums.
What a message means (packed or dense values, which extras) is agreed between a method's hooks, not here.
Read next: `train/round.py`.
"""

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .cache import once_per_tensor

if TYPE_CHECKING:
    from .flat import Layout

_MAGIC, _VERSION = b"FDIP", 1
_HEADER = struct.Struct("<4sBBHIII")
_EXTRA = struct.Struct("<BI")  # after the name: dtype code, count
_CRC = struct.Struct("<I")
_HAS_VALUES, _HAS_MASK = 1, 2
_BITMAP, _GAPS = 0, 1
_WORTH_SEARCHING = 2**20  # bytes of bitmap or gaps; a second of search for the masks of AlexNet would gain nothing
_MAX_EXTRAS, _MAX_NAME, _MAX_COUNT = 32, 32, 2**32 - 1
# The position of a dtype here is its code on the wire: append, never reorder.
_DTYPE_NAMES = ("float32", "float64", "int32", "int64", "uint8", "bool")
_DTYPES = {getattr(torch, name): np.dtype(name).newbyteorder("<") for name in _DTYPE_NAMES}


@dataclass(frozen=True, eq=False)
class Message:
    """One download or upload; any part may be absent.

    Args:
        values: (count,) float32 weights, packed by a mask or dense; any value, NaN included.
        mask: (P,) bool over the prunable weights, True = kept.
        extras: at most 32 named (count,) tensors (scores, statistics, ...); names of 1 to 32 ASCII characters;
            float32, float64, int32, int64, uint8 or bool. The mapping is copied, the tensors are not.

    Raises:
        ValueError: a part of another type, dtype or dimension, a bad name, or too many extras.
    """

    values: Tensor | None = None
    mask: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "extras", dict(self.extras))
        if self.values is not None:
            _check_part("values", self.values, (torch.float32,))
        if self.mask is not None:
            _check_part("mask", self.mask, (torch.bool,))
        if len(self.extras) > _MAX_EXTRAS:
            raise ValueError(f"extras: {len(self.extras)} tensors, at most {_MAX_EXTRAS} allowed")
        for name, tensor in self.extras.items():
            if not (isinstance(name, str) and name.isascii() and 1 <= len(name) <= _MAX_NAME):
                raise ValueError(f"extras: name {name!r}, must be 1 to {_MAX_NAME} ASCII characters")
            _check_part(f"extras[{name!r}]", tensor, tuple(_DTYPES))

    def plus(self, **extras: Tensor) -> "Message":
        """This message with these extras too."""
        return Message(self.values, self.mask, {**self.extras, **extras})


def _check_part(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes:
        found = getattr(tensor, "dtype", type(tensor).__name__)
        raise ValueError(f"{name}: {found}, must be a tensor of {' or '.join(map(str, dtypes))}")
    if tensor.dim() != 1 or tensor.numel() > _MAX_COUNT:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}, must be one dimension of at most {_MAX_COUNT}")


def num_bytes(message: Message) -> int:
    """Returns len(encode(message)) without reading values or extras: only the mask is coded, once per version."""
    values = 0 if message.values is None else 4 * message.values.numel()
    code = 0 if message.mask is None else len(_code_of(message.mask))
    extras = [1 + len(name) + _EXTRA.size + t.dtype.itemsize * t.numel() for name, t in message.extras.items()]
    return _HEADER.size + values + code + sum(extras) + _CRC.size


def encode(message: Message) -> bytes:
    """Returns the binary form; the same parts give the same bytes, whatever their device or the order of the extras."""
    values, mask = message.values, message.mask
    code = b"" if mask is None else _code_of(mask)
    flags = _HAS_VALUES * (values is not None) | _HAS_MASK * (mask is not None)
    counts = [0 if part is None else part.numel() for part in (values, mask)]
    header = _HEADER.pack(_MAGIC, _VERSION, flags, len(message.extras), *counts, len(code))
    parts = [header, b"" if values is None else _tensor_bytes(values), code]
    for name, tensor in sorted(message.extras.items()):
        tail = _EXTRA.pack(list(_DTYPES).index(tensor.dtype), tensor.numel())
        parts += [bytes([len(name)]), name.encode("ascii"), tail, _tensor_bytes(tensor)]
    body = b"".join(parts)
    return body + _CRC.pack(zlib.crc32(body))


def decode(data: bytes, layout: "Layout") -> Message:
    """Reads what `encode` wrote, distrusting every byte; needs memory for no more than data and layout allow.

    Values and extras come back bit for bit (NaN too: finite checks are the server's), in writable CPU memory.
    What is accepted encodes to the same bytes again, up to the deflate stream, which depends on the zlib build.

    Args:
        data: a whole message.
        layout: bounds the parts: at most `layout.size` values, a mask of exactly `layout.prunable` weights.

    Raises:
        ValueError: one line saying what is wrong with the data; nothing else is raised for any data.
    """
    size = len(data) if isinstance(data, bytes) else 0
    _require(size >= _HEADER.size + _CRC.size, f"a {type(data).__name__} with {size} bytes is too short")
    magic, version, flags, extras_count, count, mask_length, code_length = _HEADER.unpack_from(data)
    _require((magic, version) == (_MAGIC, _VERSION), f"begins {magic!r} {version}, must be {_MAGIC!r} {_VERSION}")
    view = memoryview(data)
    _require(_CRC.pack(zlib.crc32(view[: -_CRC.size])) == view[-_CRC.size :], "damaged or cut, its checksum differs")
    has_values, has_mask = bool(flags & _HAS_VALUES), bool(flags & _HAS_MASK)
    _require(flags <= (_HAS_VALUES | _HAS_MASK), f"flags are {flags}, must be 0 to {_HAS_VALUES | _HAS_MASK}")
    _require(extras_count <= _MAX_EXTRAS, f"{extras_count} extras, must be at most {_MAX_EXTRAS}")
    _require(count <= layout.size * has_values, f"{count} values, must be at most {layout.size * has_values}")
    prunable = layout.prunable * has_mask
    _require(mask_length == prunable, f"mask of {mask_length} weights, must be {prunable}")
    _require(has_mask or not code_length, f"{code_length} bytes of mask code without a mask")
    reader = _Reader(view[_HEADER.size : -_CRC.size])
    values = reader.tensor(torch.float32, count, "values") if has_values else None
    mask = bits_of_code(reader.take(code_length, "mask code"), mask_length) if has_mask else None
    extras = _read_extras(reader, extras_count)
    _require(not reader.view, f"{len(reader.view)} bytes left over at the end")
    return Message(values, mask, extras)


def _require(condition: bool, what_is_wrong: str) -> None:
    if not condition:
        raise ValueError(f"message: {what_is_wrong}")


class _Reader:
    """Hands out a view front to back, never more than there is."""

    def __init__(self, view: memoryview) -> None:
        self.view = view

    def take(self, count: int, what: str) -> memoryview:
        _require(count <= len(self.view), f"{what} needs {count} bytes, only {len(self.view)} are left")
        taken, self.view = self.view[:count], self.view[count:]
        return taken

    def tensor(self, dtype: torch.dtype, count: int, what: str) -> Tensor:
        on_wire = _DTYPES[dtype]
        raw = self.take(on_wire.itemsize * count, what)
        _require(dtype != torch.bool or not bytes(raw).strip(b"\0\1"), f"{what} is bool with bytes other than 0 and 1")
        # astype copies: memory of our own, writable, in this machine's byte order.
        return torch.from_numpy(np.frombuffer(raw, on_wire).astype(on_wire.newbyteorder("=")))


def _read_extras(reader: _Reader, count: int) -> dict[str, Tensor]:
    extras: dict[str, Tensor] = {}
    previous = b""  # sorts before every name, so an empty name is refused too
    for _ in range(count):
        name = bytes(reader.take(reader.take(1, "name length")[0], "name of an extra"))
        _require(name.isascii() and len(name) <= _MAX_NAME, f"name {name!r}, must be 1 to {_MAX_NAME} ASCII characters")
        _require(name > previous, f"name {name!r} follows {previous!r}, must be in order and unique")
        code, length = _EXTRA.unpack(reader.take(_EXTRA.size, f"extra {name!r}"))
        _require(code < len(_DTYPES), f"extra {name!r} has dtype code {code}, must be below {len(_DTYPES)}")
        extras[name.decode("ascii")] = reader.tensor(list(_DTYPES)[code], length, f"extra {name!r}")
        previous = name
    return extras


def _tensor_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().numpy().astype(_DTYPES[tensor.dtype], copy=False).tobytes()


@once_per_tensor
def _code_of(mask: Tensor) -> bytes:
    return _mask_code(np.packbits(mask.detach().cpu().numpy()).tobytes(), mask.numel())


@lru_cache(maxsize=16)  # equal masks in other tensors, as a decoded one, have the same code
def _mask_code(packed_bits: bytes, length: int) -> bytes:
    return code_of_bits(packed_bits, length)


def code_of_bits(packed_bits: bytes, length: int) -> bytes:
    """Returns a kind byte and the smallest deflate stream of bitmap or gaps, for `length` bits as `np.packbits` packs
    them; `bits_of_code` is its inverse.

    Deflate's search for repeats pays on masks with structure; on scattered ones Huffman coding alone is better, 1 %
    above the entropy at 5 % density. So both are tried on both, the slow search on short contents only.
    """
    mask = np.unpackbits(np.frombuffer(packed_bits, np.uint8), count=length).view(np.bool_)
    codes = []
    for kind, content in {_BITMAP: packed_bits, _GAPS: _gap_bytes(mask)}.items():
        strategies = (zlib.Z_HUFFMAN_ONLY, *([zlib.Z_DEFAULT_STRATEGY] * (len(content) <= _WORTH_SEARCHING)))
        codes += [bytes([kind]) + _deflate(content, strategy) for strategy in strategies]
    return min(codes, key=len)


def _deflate(content: bytes, strategy: int) -> bytes:
    # Raw (negative window bits): the message's own checksum makes zlib's header and checksum superfluous.
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS, strategy=strategy)
    return compressor.compress(content) + compressor.flush()


def _gap_bytes(mask: np.ndarray) -> bytes:
    """Codes the number of False before each True as one byte, 255 meaning "add 255 and read on"."""
    gaps = np.diff(np.flatnonzero(mask), prepend=-1)
    gaps -= 1
    if not gaps.size or gaps.max() < 255:
        return gaps.astype(np.uint8).tobytes()
    escapes, rest = np.divmod(gaps, 255)
    code = np.full(gaps.size + escapes.sum(), 255, np.uint8)
    code[np.cumsum(escapes + 1) - 1] = rest
    return code.tobytes()


def bits_of_code(code: memoryview, length: int) -> Tensor:
    """The (length,) bool that `code_of_bits` coded, distrusting every byte. Raises ValueError: one line."""
    kind = code[0] if code else None
    _require(kind in (_BITMAP, _GAPS), f"mask code is of kind {kind}, must be {_BITMAP} or {_GAPS}")
    packed_length = (length + 7) // 8
    # A gap byte moves on by at least one weight, so there are at most `length` of them.
    content = np.frombuffer(_inflate(code[1:], packed_length if kind == _BITMAP else length), np.uint8)
    if kind == _BITMAP:
        bits = np.unpackbits(content)
        whole = content.size == packed_length and not bits[length:].any()
        _require(whole, f"mask bitmap of {content.size} bytes, must be {packed_length} padded with 0")
        return torch.from_numpy(bits[:length].view(np.bool_))
    _require(not content.size or content[-1] != 255, "mask code ends in the middle of a gap")
    ends = np.cumsum(content + (content != 255), dtype=np.int64)  # a gap and its True, or 255 more
    _require(not content.size or ends[-1] <= length, f"mask gaps go beyond its {length} weights")
    mask = np.zeros(length, np.bool_)
    mask[ends[content != 255] - 1] = True
    return torch.from_numpy(mask)


def _inflate(stream: memoryview, limit: int) -> bytes:
    """Inflates one whole stream of at most `limit` bytes; a bomb is stopped there."""
    decompressor = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
    try:
        content = decompressor.decompress(stream, limit + 1)  # + 1: a limit of 0 would mean none
    except zlib.error as error:
        raise ValueError(f"message: mask code does not inflate ({error})") from None
    whole = len(content) <= limit and decompressor.eof and not decompressor.unused_data
    _require(whole, f"mask code is not one whole stream of at most {limit} bytes")
    return content
