"""Laws of long runs: the last rounds need no more memory and no more time than the first."""

import json
import statistics
import sys

import pytest
from conftest import FAST, tiny_config
from victims import child, watched_run

ROUNDS, MORE_ROUNDS = 150, 2000
WINDOW = 100  # rounds that are compared, at the start and at the end
GROWTH = 1.05
SLOWER = 1.25  # the machine has other things to do; a cost that grew with the rounds would be a multiple


def rounds_of(folder, rounds, **settings):
    """(resident bytes after each round, CPU seconds of each round but the first) of a run of the digits."""
    process = child(watched_run, tiny_config(**FAST, rounds=rounds, **settings), folder / "results", folder / "facts")
    process.join(3000)
    assert process.exitcode == 0
    resident, clock = zip(*json.loads((folder / "facts").read_text()), strict=True)
    return resident, [after - before for before, after in zip(clock, clock[1:], strict=False)]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_memory_does_not_grow_with_the_rounds(tmp_path):
    resident, _ = rounds_of(tmp_path, ROUNDS)
    assert statistics.mean(resident[-20:]) < GROWTH * statistics.mean(resident[20:40])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize(
    "settings", [{}, {"method": "feddst", "preset": "repo"}], ids=["FedDIP", "FedDST, whose clients keep masks"]
)
def test_two_thousand_rounds_need_no_more_memory_and_no_more_time_at_their_end(tmp_path, settings):
    resident, seconds = rounds_of(tmp_path, MORE_ROUNDS, **settings)
    assert len(resident) == MORE_ROUNDS
    assert statistics.mean(resident[-WINDOW:]) < GROWTH * statistics.mean(resident[:WINDOW])
    assert min(seconds[-WINDOW:]) < SLOWER * min(seconds[:WINDOW])  # the least: what runs beside it only adds
