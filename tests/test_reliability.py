"""Laws of docs/reliability.md: it says what the tests say, and the numbers of cases are those that were asked for."""

import pytest
from promises import PAGE, PROMISES, cases, is_slow, page

PROOFS = {
    test: count for promises in PROMISES.values() for promise in promises for test, count in promise.proofs.items()
}


def tried(*words, slow=(False, True)):
    """Cases of all proofs whose name holds one of `words`."""
    chosen = [test for test in PROOFS if any(word in test.__name__ for word in words) and is_slow(test) in slow]
    assert chosen
    return sum(cases(test) * PROOFS[test] for test in chosen)


def test_page_is_what_the_tests_say():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/promises.py"


@pytest.mark.parametrize("test", PROOFS, ids=lambda test: test.__name__)
def test_every_proof_is_a_test_that_is_collected(test):
    assert test.__name__.startswith("test_")
    assert test.__module__.startswith("test_")


def test_as_many_cases_are_tried_as_were_asked_for():
    assert tried("killed_run") >= 3 * 10
    assert tried("damaged_checkpoint", slow=[False]) >= 1 + 20 + 50
    assert tried("malformed", "hostile_archive", slow=[False]) >= 20
    assert tried("wrong_value", "wrong_command_line", slow=[False]) >= 60
    assert tried("many_mutated") >= 100_000
