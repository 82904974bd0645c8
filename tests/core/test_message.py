"""Laws of the message codec: exact round trips, exact sizes, short mask codes, only ValueError for bad bytes."""

import ast
import re
import sys
import tracemalloc
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from feddip_lite.core import message as codec
from feddip_lite.core.message import Message, decode, encode, num_bytes

DTYPES = (torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8, torch.bool)
DENSITIES = (0.0, 0.004, 0.05, 0.3, 0.5, 0.9, 1.0)
HEADER, CRC = 20, 4


def layout_of(size=20, prunable=10, buffer_size=4):
    return SimpleNamespace(size=size, prunable=prunable, buffer_size=buffer_size)


def layout_for(message):
    prunable = 0 if message.mask is None else message.mask.numel()
    return layout_of(size=0 if message.values is None else message.values.numel(), prunable=prunable)


def random_tensor(rng, dtype, count):
    """Any bit pattern of the dtype, so NaNs of all kinds, infinities and subnormals occur."""
    if dtype == torch.bool:
        return torch.from_numpy(rng.random(count) < 0.5)
    raw = rng.integers(0, 256, count * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype) if count else torch.empty(0, dtype=dtype)


def random_mask(rng, length, density=None):
    density = rng.choice(DENSITIES) if density is None else density
    mask = rng.random(length) < density
    if rng.random() < 0.3:  # structure: a stretch that is all kept or all pruned
        start, stop = np.sort(rng.integers(0, length + 1, 2))
        mask[start:stop] = rng.random() < 0.5
    return torch.from_numpy(mask)


def random_message(rng, most=5000):
    some, many = ((most + 1) ** rng.random(2)).astype(int) - 1  # short ones often, 0 and 1 included
    values = random_tensor(rng, torch.float32, some) if rng.random() < 0.8 else None
    mask = random_mask(rng, many) if rng.random() < 0.8 else None
    names = {"".join(map(chr, rng.integers(0, 128, rng.integers(1, 33)))) for _ in range(rng.integers(0, 5))}
    sizes = rng.integers(0, most // 10 + 2, len(names))
    extras = {
        name: random_tensor(rng, DTYPES[rng.integers(6)], n) for name, n in zip(sorted(names), sizes, strict=True)
    }
    return Message(values, mask, extras)


def parts_of(message):
    """Everything a message says, comparable bit for bit."""
    parts = {"values": message.values, "mask": message.mask} | {f"extra {k}": t for k, t in message.extras.items()}
    return {k: None if t is None else (t.dtype, tuple(t.shape), t.numpy().tobytes()) for k, t in parts.items()}


def seal(body):
    return body + zlib.crc32(body).to_bytes(4, "little")


def raw_message(flags=0, extras=0, values=0, mask=0, code=0, body=b""):
    return seal(codec._HEADER.pack(b"FDIP", 1, flags, extras, values, mask, code) + body)


def mask_message(kind, content, length, tail=b""):
    """A message with the given bitmap or gap bytes, well compressed, whatever they mean."""
    code = bytes([kind]) + codec._deflate(content, zlib.Z_DEFAULT_STRATEGY) + tail
    return raw_message(flags=2, mask=length, code=len(code), body=code)


def entropy_bits(density):
    return -density * np.log2(density) - (1 - density) * np.log2(1 - density)


# Round trips and sizes


def test_every_message_comes_back_bit_for_bit_and_is_as_long_as_announced():
    rng = np.random.default_rng(0)
    for _ in range(1200):
        message = random_message(rng)
        data = encode(message)
        assert len(data) == num_bytes(message)
        back = decode(data, layout_for(message))
        assert parts_of(back) == parts_of(message)
        assert encode(back) == data


def message_of_a_method(rng, layout):
    """What one or another method sends: packed or dense weights, a mask alone, and the extras they agree on."""
    size, prunable = layout.size, layout.prunable
    mask = random_mask(rng, prunable, rng.choice([0.0, 0.05, 0.5, 1.0]))
    kept = int(rng.integers(prunable + 1))
    dropped = random_tensor(rng, torch.bool, 10)
    packed = random_tensor(rng, torch.float32, int(mask.sum()) + size - prunable)
    largest = {
        "indices": torch.from_numpy(rng.permutation(prunable)[:kept].astype(np.int32)),
        "gradients": random_tensor(rng, torch.float32, kept),
    }
    forms = [
        Message(packed, mask),
        Message(packed, None, {"buffers": random_tensor(rng, torch.float32, layout.buffer_size)}),
        Message(None, mask),
        Message(None, None, {"scores": random_tensor(rng, torch.float32, prunable)}),
        Message(packed, mask, {"squared_gradients": random_tensor(rng, torch.float32, prunable)}),
        Message(packed, None, largest),
        Message(random_tensor(rng, torch.float32, size * int((~dropped).sum()) // 10), None, {"dropped": dropped}),
        Message(random_tensor(rng, torch.float32, size), None, {"mask_seed": random_tensor(rng, torch.int64, 1)}),
    ]
    message = forms[rng.integers(len(forms))]
    account = {"samples": torch.from_numpy(rng.integers(1, 10_000, 1)), "loss": random_tensor(rng, torch.float64, 1)}
    return Message(message.values, message.mask, {**message.extras, **account})


def test_everything_that_methods_send_comes_back_bit_for_bit_and_is_as_long_as_announced():
    rng, layout = np.random.default_rng(10), layout_of(size=700, prunable=600, buffer_size=40)
    seen = set()
    for _ in range(1200):
        message = message_of_a_method(rng, layout)
        data = encode(message)
        assert len(data) == num_bytes(message)
        assert parts_of(decode(data, layout)) == parts_of(message)
        seen |= {*message.extras, None if message.mask is None else message.mask.double().mean().item()}
    extras = {"buffers", "scores", "squared_gradients", "indices", "gradients", "dropped", "mask_seed"}
    assert seen > {*extras, None, 0.0, 1.0}  # masks of density 0 and 1 among them


@pytest.mark.parametrize("density", DENSITIES)
def test_a_million_weights_come_back_at_every_density(density):
    rng = np.random.default_rng(1)
    message = Message(random_tensor(rng, torch.float32, 10**6), random_mask(rng, 10**6, density))
    data = encode(message)
    assert len(data) == num_bytes(message)
    assert parts_of(decode(data, layout_for(message))) == parts_of(message)


@pytest.mark.parametrize("gap", [0, 1, 254, 255, 256, 509, 510, 511, 765, 10_000])
def test_a_gap_of_any_width_comes_back(gap):
    mask = torch.zeros(2 * gap + 9, dtype=torch.bool)
    mask[[gap, 2 * gap + 1]] = True
    data = mask_message(codec._GAPS, codec._gap_bytes(mask.numpy()), mask.numel())
    assert torch.equal(decode(data, layout_of(prunable=mask.numel())).mask, mask)


def test_nan_payloads_signed_zeros_and_infinities_survive_bit_exactly():
    bits = torch.tensor([0x7FC00000, 0x7F800001, -1, -0x80000000, 0x7F800000, -0x800000, 1], dtype=torch.int32)
    message = Message(bits.view(torch.float32), extras={"s": bits.view(torch.float32).double()})
    back = decode(encode(message), layout_of())
    assert torch.equal(back.values.view(torch.int32), bits)
    assert parts_of(back) == parts_of(message)


def test_absent_and_empty_parts_are_told_apart():
    assert decode(encode(Message()), layout_of()).values is None
    empty = decode(encode(Message(torch.empty(0), torch.empty(0, dtype=torch.bool))), layout_of(prunable=0))
    assert empty.values.numel() == empty.mask.numel() == 0
    assert num_bytes(Message()) == HEADER + CRC


def test_decoded_tensors_are_writable_and_leave_the_bytes_alone():
    message = Message(torch.ones(5), torch.ones(10, dtype=torch.bool), {"s": torch.ones(3)})
    data = encode(message)
    back = decode(data, layout_of())
    for tensor in (back.values, back.mask, back.extras["s"]):
        tensor.zero_()
    assert encode(message) == data


def test_views_and_trainable_values_encode_like_their_copies():
    values = torch.arange(20.0, requires_grad=True)
    mask = torch.arange(20) % 3 == 0
    strided = Message(values[::2], mask[::2], {"s": values[1::2]})
    copied = Message(values[::2].detach().clone(), mask[::2].clone(), {"s": values[1::2].detach().clone()})
    assert encode(strided) == encode(copied)


def test_the_bytes_do_not_depend_on_the_order_of_the_extras_or_on_the_cache():
    rng = np.random.default_rng(3)
    extras = {name: random_tensor(rng, torch.int64, 4) for name in ("b", "a", "ab", "B")}
    message = Message(torch.ones(3), random_mask(rng, 1000, 0.1), extras)
    data = encode(message)
    codec._mask_code.cache_clear()
    assert encode(Message(message.values, message.mask, dict(reversed(extras.items())))) == data


def test_a_mask_is_coded_once_however_often_it_is_sent_and_again_when_it_changes():
    codec._mask_code.cache_clear()
    mask = random_mask(np.random.default_rng(4), 1000, 0.2)
    for _ in range(5):
        message = Message(torch.ones(3), mask.clone())
        assert num_bytes(message) == len(encode(message))
    assert codec._mask_code.cache_info().misses == 1
    mask.logical_not_()
    assert torch.equal(decode(encode(Message(mask=mask)), layout_of(prunable=1000)).mask, mask)


def test_counting_bytes_never_reads_values_or_extras():
    message = Message(torch.empty(10, device="meta"), extras={"s": torch.empty(7, dtype=torch.int64, device="meta")})
    assert num_bytes(message) == HEADER + 40 + (1 + 1 + 1 + 4 + 56) + CRC


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_message_on_the_gpu_has_the_same_bytes():
    message = random_message(np.random.default_rng(5))
    extras = {name: tensor.cuda() for name, tensor in message.extras.items()}
    on_gpu = Message(*(None if t is None else t.cuda() for t in (message.values, message.mask)), extras)
    assert encode(on_gpu) == encode(message)


# How short a mask code is


def test_a_mask_at_5_percent_density_is_coded_within_5_percent_of_its_entropy():
    mask = torch.from_numpy(np.random.default_rng(6).random(200_000) < 0.05)
    assert 8 * len(codec._code_of(mask)) <= 1.05 * entropy_bits(mask.double().mean().item()) * mask.numel()


def test_no_mask_code_is_longer_than_its_bitmap_in_zlib():
    rng = np.random.default_rng(7)
    masks = [random_mask(rng, rng.integers(0, 20_000)) for _ in range(200)]
    masks += [torch.arange(50_000) % period == 0 for period in (1, 2, 3, 7, 9, 64, 1000)]
    masks.append(torch.cat([torch.ones(50_000).bool(), torch.from_numpy(rng.random(50_000) < 0.05)]))
    for mask in masks:
        assert len(codec._code_of(mask)) <= len(zlib.compress(np.packbits(mask.numpy()).tobytes(), 9))


# Bad input


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"values": [1.0]}, "values: list"),
        ({"values": torch.zeros(3, dtype=torch.float64)}, "values: torch.float64"),
        ({"values": torch.zeros(3, 1)}, r"values: shape \(3, 1\)"),
        ({"values": torch.tensor(1.0)}, r"values: shape \(\)"),
        ({"values": torch.empty(2**32, device="meta")}, "values: shape"),
        ({"mask": torch.zeros(3, dtype=torch.uint8)}, "mask: torch.uint8"),
        ({"mask": torch.zeros(3, 2, dtype=torch.bool)}, "mask: shape"),
        ({"extras": {"": torch.zeros(1)}}, "name ''"),
        ({"extras": {"x" * 33: torch.zeros(1)}}, "1 to 32 ASCII"),
        ({"extras": {"é": torch.zeros(1)}}, "1 to 32 ASCII"),
        ({"extras": {3: torch.zeros(1)}}, "name 3"),
        ({"extras": {"s": torch.zeros(1, dtype=torch.float16)}}, r"extras\['s'\]: torch.float16"),
        ({"extras": {"s": torch.zeros(1, 1)}}, r"extras\['s'\]: shape"),
        ({"extras": {"s": 1.0}}, r"extras\['s'\]: float"),
        ({"extras": {f"s{i}": torch.zeros(1) for i in range(33)}}, "33 tensors, at most 32"),
    ],
)
def test_a_message_refuses_parts_it_could_not_send(parts, reason):
    with pytest.raises(ValueError, match=reason):
        Message(**parts)


def extra(name, code=4, count=0, body=b""):
    return bytes([len(name)]) + name + codec._EXTRA.pack(code, count) + body


REFUSED = {
    "nothing": (b"", "too short"),
    "text": ("FDIP", "a str"),
    "23 bytes": (raw_message()[:-1], "too short"),
    "a foreign file": (b"PK\x03\x04" + bytes(40), "begins b'PK"),
    "a later version": (seal(b"FDIP\x02" + bytes(15)), "2, must be b'FDIP' 1"),
    "a flipped bit": (raw_message()[:-1] + b"\0", "checksum"),
    "an unknown flag": (raw_message(flags=4), "flags are 4"),
    "more values than weights": (raw_message(flags=1, values=21, body=bytes(84)), "21 values, must be at most 20"),
    "values without their flag": (raw_message(values=1, body=bytes(4)), "1 values, must be at most 0"),
    "values that are not there": (raw_message(flags=1, values=20, body=bytes(79)), "needs 80 bytes, only 79"),
    "a mask without its flag": (raw_message(mask=10), "must be 0"),
    "a mask code without a mask": (raw_message(code=2, body=b"\0\0"), "without a mask"),
    "a mask of another model": (mask_message(0, bytes(2), 11), "mask of 11 weights, must be 10"),
    "an empty mask code": (raw_message(flags=2, mask=10), "of kind None"),
    "a mask code of unknown kind": (mask_message(2, bytes(2), 10), "of kind 2"),
    "a mask code that is cut": (raw_message(flags=2, mask=10, code=2, body=b"\0\3"), "one whole stream"),
    "a mask code that is noise": (raw_message(flags=2, mask=10, code=3, body=b"\0\xff\xff"), "does not inflate"),
    "bytes after the mask stream": (mask_message(0, bytes(2), 10, tail=b"\0"), "one whole stream"),
    "a bitmap that is short": (mask_message(0, bytes(1), 10), "bitmap of 1 bytes"),
    "a bitmap that is long": (mask_message(0, bytes(3), 10), "at most 2 bytes"),
    "a bitmap with padding bits": (mask_message(0, b"\0\1", 10), "padded with 0"),
    "gaps beyond the mask": (mask_message(1, b"\0\t", 10), "beyond its 10 weights"),
    "an escape beyond the mask": (mask_message(1, b"\xff\0", 10), "beyond its 10 weights"),
    "gaps that end in an escape": (mask_message(1, b"\0\xff", 10), "middle of a gap"),
    "more gaps than weights": (mask_message(1, bytes(11), 10), "at most 10 bytes"),
    "more extras than allowed": (raw_message(extras=33), "33 extras"),
    "an extra that is not there": (raw_message(extras=1), "name length needs 1 bytes, only 0"),
    "an extra without a name": (raw_message(extras=1, body=extra(b"")), "must be in order"),
    "a name that is too long": (raw_message(extras=1, body=extra(b"x" * 33)), "1 to 32 ASCII"),
    "a name that is not ASCII": (raw_message(extras=1, body=extra(b"\xc3\xa9")), "1 to 32 ASCII"),
    "the same name twice": (raw_message(extras=2, body=extra(b"a") + extra(b"a")), "in order and unique"),
    "names out of order": (raw_message(extras=2, body=extra(b"b") + extra(b"a")), "in order and unique"),
    "an unknown dtype": (raw_message(extras=1, body=extra(b"a", code=6)), "dtype code 6"),
    "an extra longer than its bytes": (raw_message(extras=1, body=extra(b"a", 3, 2**32 - 1, bytes(8))), "needs"),
    "a bool that is neither": (raw_message(extras=1, body=extra(b"a", 5, 3, b"\0\2\1")), "other than 0 and 1"),
    "bytes after the end": (raw_message(body=b"\0"), "1 bytes left over"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_decode_refuses(case):
    data, reason = REFUSED[case]
    with pytest.raises(ValueError, match=reason) as refusal:
        decode(data, layout_of())
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", [0, 1])
def test_a_decompression_bomb_is_refused_within_the_memory_its_mask_may_need(kind):
    bomb = mask_message(kind, bytes(64 << 20), 1000)
    assert len(bomb) < 100_000
    tracemalloc.start()
    with pytest.raises(ValueError, match="one whole stream"):
        decode(bomb, layout_of(prunable=1000))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 4 * len(bomb)


def mutate(rng, data, other):
    """Flips, overwrites, cuts, splices or repeats a piece, then mends the checksum half of the time."""
    body = bytearray(data[:-CRC])
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(body)))
        match rng.integers(6):
            case 0:
                body[at] ^= 1 << int(rng.integers(8))
            case 1:
                body[at] = rng.choice([0, 1, 127, 128, 255])
            case 2:
                del body[max(at, 1) :]
            case 3:
                body[at:] = other[int(rng.integers(len(other))) :]
            case 4:
                body[at:at] = body[at : at + int(rng.integers(1, 9))]
            case 5:
                body[int(rng.integers(min(HEADER, len(body))))] = rng.integers(256)
    return seal(bytes(body)) if rng.random() < 0.5 else bytes(body) + data[-CRC:]


def fuzz(mutations, seed):
    """Returns how many mutants were accepted and how many different reasons refused the others."""
    rng = np.random.default_rng(seed)
    layout = layout_of(size=300, prunable=200)
    corpus = []
    while len(corpus) < 200:
        message = random_message(rng, most=200)
        corpus.append(Message(message.values, random_mask(rng, 200), message.extras))
        corpus.append(Message(message.values, None, message.extras))
    corpus = [encode(message) for message in corpus]
    accepted, reasons = 0, set()
    for _ in range(mutations):
        mutant = mutate(rng, corpus[rng.integers(len(corpus))], corpus[rng.integers(len(corpus))])
        try:
            message = decode(mutant, layout)
        except ValueError as refusal:
            reasons.add("".join(c for c in re.split("['\"(]", str(refusal))[0] if c.isalpha()))
            continue
        accepted += 1
        again = encode(message)
        assert parts_of(decode(again, layout)) == parts_of(message)
        assert message.mask is not None or again == mutant
    return accepted, len(reasons)


def test_mutated_messages_raise_nothing_but_value_errors():
    accepted, reasons = fuzz(5_000, seed=8)
    assert accepted > 100  # else the mended mutants did not reach the tensors
    assert reasons > 15  # nor the inner checks


@pytest.mark.slow
def test_a_hundred_thousand_mutated_messages_raise_nothing_but_value_errors():
    fuzz(100_000, seed=9)


def test_the_module_needs_only_numpy_torch_and_the_standard_library():
    tree = ast.parse(Path(codec.__file__).read_text(encoding="utf-8"))
    needed = {a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names}
    needed |= {n.module for n in tree.body if isinstance(n, ast.ImportFrom)}
    assert {name.split(".")[0] for name in needed} <= {"cache", "numpy", "torch", *sys.stdlib_module_names}
