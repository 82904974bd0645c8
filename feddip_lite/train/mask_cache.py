"""Masks told over those that clients hold (`mask_cache`): what a client knows of its mask is not sent again.

    held h (P,), new m (P,)    m where h keeps; m where h prunes, if any of it is kept again    each coded as a mask

A client that holds m already is sent four bytes. A mask that only prunes further costs at most a bit for each weight
that was left; since keep counts never grow, most masks of FedDIP are such. Nothing is lost: the client has the mask,
to the bit, and trains as ever. Both ends hold the last mask under which the client's reply was merged: the client in
its memory, the server in `ServerState.held`.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..core.cache import once_per_tensor
from ..core.message import Message, bits_of_code, code_of_bits
from ..core.state import Memory

HELD = "held mask"
"""In a client's memory, beside what the method keeps there: the mask as `np.packbits` packs it, uint8."""
PART = "mask over held"
"""Of a message, in place of its mask: CRC-32 of what is held; then, if the mask is another, the length of the first
code and both codes."""
_NUMBER = struct.Struct("<I")


@once_per_tensor
def packed(mask: Tensor) -> Tensor:
    """A mask (P,) bool as it is held: uint8, eight weights a byte. Of a mask on a GPU this waits for the device."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def told(offer: Message, held: Tensor | None) -> Message:
    """An offer whose mask is told over the one that its client holds; as it is, if there is none of either."""
    if offer.mask is None or held is None:
        return offer
    held = held.cpu()
    code = _NUMBER.pack(zlib.crc32(held.numpy()))
    if not torch.equal(held, packed(offer.mask)):
        kept, new = _bits(held, len(offer.mask)), offer.mask.cpu().numpy()
        left, back = new[kept], new[~kept]
        first, second = _code(left), _code(back) if back.any() else b""
        code += _NUMBER.pack(len(first)) + first + second
    return replace(offer, mask=None).plus(**{PART: torch.frombuffer(bytearray(code), dtype=torch.uint8)})


def whole(message: Message, memory: Memory, prunable: int, device: torch.device) -> Message:
    """The inverse of `told`: an offer with its whole mask, on `device`.

    Raises:
        ValueError: the client does not hold the mask that this one is told over, or the code is damaged.
    """
    if PART not in message.extras:
        return message
    extras, held = dict(message.extras), memory[HELD].cpu() if HELD in memory else None
    data = memoryview(extras.pop(PART).cpu().numpy()).cast("B")
    if len(data) < _NUMBER.size:
        raise ValueError(f"the offer's {PART!r}: cut")
    if held is None or _NUMBER.unpack_from(data)[0] != zlib.crc32(held.numpy()):
        raise ValueError("the offer tells its mask over one that this client does not hold; run without mask_cache")
    mask, code = _bits(held, prunable), data[_NUMBER.size :]
    if code:
        length = _NUMBER.unpack_from(code)[0] if len(code) >= _NUMBER.size else len(code)
        first, second = code[_NUMBER.size :][:length], code[_NUMBER.size :][length:]
        new, pruned = np.zeros_like(mask), ~mask
        new[mask] = bits_of_code(first, np.count_nonzero(mask)).numpy()
        if second:
            new[pruned] = bits_of_code(second, np.count_nonzero(pruned)).numpy()
        mask = new
    return Message(message.values, torch.from_numpy(mask).to(device), extras)


def held_part(memory: Memory, mask: Tensor | None) -> Memory:
    """What a client remembers of masks after a round under `mask`: without one, what it held before."""
    if mask is not None:
        return {HELD: packed(mask)}
    return {HELD: memory[HELD]} if HELD in memory else {}


def _bits(held: Tensor, length: int) -> np.ndarray:
    return np.unpackbits(held.numpy(), count=length).view(np.bool_)


def _code(bits: np.ndarray) -> bytes:
    return code_of_bits(np.packbits(bits).tobytes(), len(bits))
