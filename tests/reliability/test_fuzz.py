"""Laws of decoding untrusted bytes: for any of them only ValueError, little memory, no time."""

import time
import tracemalloc

import numpy as np
import pytest
from test_message import extra, layout_of, mutate, random_mask, random_message, raw_message

from feddip_lite.core.message import Message, decode, encode

MUTANTS, MORE_MUTANTS = 2_000, 100_000
SIZE, PRUNABLE = 300, 200
EXAMPLES = 400
LIMIT_SECONDS = 1.0
ZLIB_BYTES = 2**16  # what inflating needs whatever the message


def examples(rng):
    """Messages with and without a mask, encoded."""
    while True:
        message = random_message(rng, most=PRUNABLE)
        yield encode(Message(message.values, random_mask(rng, PRUNABLE), message.extras))
        yield encode(Message(message.values, None, message.extras))


def fuzz(count: int, seed: int) -> int:
    """Decode `count` mutants; how many were accepted. Memory is that of Python, numpy and zlib while decoding."""
    rng, layout = np.random.default_rng(seed), layout_of(SIZE, PRUNABLE)
    corpus = [data for data, _ in zip(examples(rng), range(EXAMPLES), strict=False)]
    accepted = 0
    tracemalloc.start()
    try:
        for _ in range(count):
            mutant = mutate(rng, corpus[rng.integers(EXAMPLES)], corpus[rng.integers(EXAMPLES)])
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            start = time.perf_counter()
            try:
                decode(mutant, layout)
                accepted += 1
            except ValueError as error:
                assert "\n" not in str(error)
            assert time.perf_counter() - start < LIMIT_SECONDS
            used = tracemalloc.get_traced_memory()[1] - before
            assert used < 4 * len(mutant) + 4 * SIZE + 40 * PRUNABLE + ZLIB_BYTES
    finally:
        tracemalloc.stop()
    return accepted


def test_mutated_messages_need_little_memory_and_no_time():
    assert MUTANTS / 50 < fuzz(MUTANTS, seed=0) < MUTANTS / 2


@pytest.mark.slow
def test_many_mutated_messages_need_little_memory_and_no_time():
    fuzz(MORE_MUTANTS, seed=1)


@pytest.mark.parametrize("field", ["extras", "values", "mask", "code", "extra"])
@pytest.mark.parametrize("count", [2**16 - 1, 2**31 - 1, 2**32 - 1])
def test_message_that_announces_more_than_it_holds_is_refused_without_memory_for_it(field, count):

    parts = {"flags": 3 if field in ("mask", "code") else field == "values"}
    if field == "extra":
        data = raw_message(extras=1, body=extra(b"a", 3, count, bytes(64)))
    else:
        data = raw_message(**parts, **{field: min(count, 2**16 - 1) if field == "extras" else count}, body=bytes(64))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            decode(data, layout_of(SIZE, PRUNABLE))
        assert tracemalloc.get_traced_memory()[1] < ZLIB_BYTES
    finally:
        tracemalloc.stop()
