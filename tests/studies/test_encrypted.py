"""Laws of averaging under encryption: the mean is the plain one, and what is not sent costs nothing."""

import sys

import numpy as np
import pytest

from feddip_lite.studies.encrypted import SLOTS, encrypted_mean


@pytest.fixture
def clients():
    pytest.importorskip("tenseal", reason="needs the extra feddip-lite[encrypted]")
    draw = np.random.default_rng(0)
    return lambda length: [draw.normal(0, 0.1, length) for _ in range(3)]


@pytest.mark.parametrize("length", [1, SLOTS, SLOTS + 1, 2 * SLOTS + 7])
def test_the_decrypted_mean_is_the_plain_one_weighted_by_samples(length, clients):
    vectors, sizes = clients(length), (10, 700, 1200)
    mean, _ = encrypted_mean(vectors, sizes)
    assert mean.shape == (length,)
    np.testing.assert_allclose(mean, np.average(vectors, axis=0, weights=sizes), atol=1e-6)


def test_the_mean_depends_on_proportions_of_samples_alone_and_equal_vectors_are_their_own(clients):
    vectors = clients(5)
    one, other = (encrypted_mean(vectors, sizes)[0] for sizes in ((1, 2, 3), (1000, 2000, 3000)))
    np.testing.assert_allclose(one, other, atol=1e-6)
    np.testing.assert_allclose(encrypted_mean([vectors[0]] * 3, (1, 5, 9))[0], vectors[0], atol=1e-6)


def test_a_message_grows_by_ciphertexts_and_the_answer_is_shorter(clients):
    sent = [encrypted_mean(clients(pieces * SLOTS), (1, 1, 1))[1] for pieces in (1, 2, 4)]
    for name in ("up_bytes", "down_bytes"):
        one, two, four = (taken[name] for taken in sent)
        assert two == pytest.approx(2 * one, rel=0.01) and four == pytest.approx(4 * one, rel=0.01)
    assert all(taken["down_bytes"] < taken["up_bytes"] for taken in sent)  # a rescaling took a prime off


@pytest.mark.parametrize("name", ["encrypt_s", "add_s", "decrypt_s", "up_bytes", "down_bytes", "key_bytes"])
def test_what_it_took_is_a_plain_number(name, clients):
    taken = encrypted_mean(clients(3), (1, 1, 1))[1][name]
    assert type(taken) in (int, float) and taken > 0


@pytest.mark.parametrize(
    "vectors, words",
    [
        ([np.ones(3), np.ones(4)], "expected one length above 0"),
        ([np.ones(0), np.ones(0)], "expected one length above 0"),
        ([np.ones(3), np.array([1, np.nan, 1])], "NaN or a number beyond 1e3"),
        ([np.ones(3), np.array([1, 2e3, 1])], "NaN or a number beyond 1e3"),
    ],
)
def test_what_cannot_be_averaged_is_refused(vectors, words, clients):
    with pytest.raises(ValueError, match=words):
        encrypted_mean(vectors, (1, 1))


def test_without_tenseal_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tenseal", None)
    with pytest.raises(ValueError, match=r"install feddip-lite\[encrypted\]"):
        encrypted_mean([np.ones(3)], (1,))
