"""Laws of docs/reliability.md: it says what the tests say, and the numbers of cases are those that were asked for."""

import pytest
from promises import PAGE, PROMISES, cases, page

PROOFS = {
    test: count for promises in PROMISES.values() for promise in promises for test, count in promise.proofs.items()
}


def tried(*words):
    """(cases in `make test`, cases in `make test-slow`) of all proofs whose name holds one of `words`."""
    chosen = [test for test in PROOFS if any(word in test.__name__ for word in words)]
    quick, slow = zip(*(cases(test) for test in chosen), strict=True)
    counts = [PROOFS[test] for test in chosen]
    return tuple(sum(n * count for n, count in zip(sets, counts, strict=True)) for sets in (quick, slow))


def test_page_is_what_the_tests_say():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/reliability/promises.py"


@pytest.mark.parametrize("test", PROOFS, ids=lambda test: test.__name__)
def test_every_proof_is_a_test_that_is_collected(test):
    assert test.__name__.startswith("test_")
    assert test.__module__.startswith("test_")


def test_as_many_cases_are_tried_as_were_asked_for():
    assert tried("killed_run_goes_on", "many_killed_runs") >= (10, 3 * 10)
    assert tried("damaged_checkpoint")[0] >= 1 + 20 + 50
    assert tried("malformed", "hostile_archive")[0] >= 20
    assert tried("wrong_value", "wrong_command_line")[0] >= 60
    assert tried("many_mutated")[1] >= 100_000
