"""Laws of the schedules: cubic sparsity, the growing penalty in both readings, the learning rate."""

import pytest

from feddip_lite import Config
from feddip_lite.core.schedules import cosine_at, penalty_at, published_penalty_at, sparsity_at


@pytest.mark.parametrize("rounds", [1, 2, 5, 1000])
def test_sparsity_schedule_starts_at_initial_and_stays_below_final(rounds):
    values = [sparsity_at(t, 0.5, 0.9, rounds) for t in range(rounds)]
    assert values[0] == pytest.approx(0.5, abs=1e-15)
    assert values == sorted(values)
    assert values[-1] < 0.9
    assert 0.9 - values[-1] == pytest.approx(0.4 / rounds**3)


def test_sparsity_schedule_of_one_round_is_initial():
    assert sparsity_at(0, 0.5, 0.9, 1) == pytest.approx(0.5, abs=1e-15)


@pytest.mark.parametrize(("t", "value"), [(0, 0.0), (1, 0.8 - 0.8 * 0.421875), (2, 0.7), (3, 0.7875)])
def test_sparsity_schedule_is_cubic_in_the_share_of_rounds(t, value):
    assert sparsity_at(t, 0.0, 0.8, 4) == pytest.approx(value, abs=1e-12)


def test_sparsity_schedule_is_constant_between_equal_ends():
    assert {sparsity_at(t, 0.8, 0.8, 10) for t in range(10)} == {0.8}


def test_time_average_of_the_cubic_schedule_is_final_minus_a_quarter_of_the_gap():
    assert sum(sparsity_at(t, 0.5, 0.9, 1000) for t in range(1000)) / 1000 == pytest.approx(0.8, abs=3e-4)


@pytest.mark.parametrize("rounds", [1, 2, 5, 20, 50, 1000])
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_penalty_is_equation_3(rounds, steps):
    for t in range(rounds):
        steps_done = sum(1 for q in range(1, steps + 1) if q * rounds <= steps * t)  # floor without division
        assert penalty_at(t, 1e-3, steps, rounds) == pytest.approx(1e-3 * steps_done / steps, abs=1e-18)


@pytest.mark.parametrize("rounds", [1, 2, 5, 1000])
def test_penalty_of_a_single_step_is_zero_throughout(rounds):
    assert {penalty_at(t, 1e-3, 1, rounds) for t in range(rounds)} == {0.0}


@pytest.mark.parametrize(
    ("rounds", "twentieths"), [(1, [0]), (2, [0, 10]), (5, [0, 4, 8, 12, 16])], ids=["1", "2", "5"]
)
def test_penalty_of_few_rounds_skips_steps_but_keeps_the_pace(rounds, twentieths):
    expected = [20 * k / 20 for k in twentieths]
    assert [penalty_at(t, 20.0, 20, rounds) for t in range(rounds)] == expected


def test_penalty_grows_by_equal_steps_of_equal_length_and_ends_one_step_below_its_peak():
    values = [penalty_at(t, 20.0, 20, 1000) for t in range(1000)]
    assert [values.count(k) for k in range(21)] == [50] * 20 + [0]
    assert values == sorted(values)


def test_published_penalty_is_zero_then_jumps_to_its_start_and_ends_one_step_below_its_peak():
    values = [published_penalty_at(t, 1e-3, 20, 1000) for t in range(1000)]
    assert values[:50] == [0.0] * 50
    assert values[50:100] == [5e-4] * 50
    assert values[950:] == [values[-1]] * 50
    assert values[-1] == pytest.approx(9.74e-4, abs=4e-7)
    assert values[-1] == pytest.approx(1e-3 - 5e-4 / 19)
    levels = sorted(set(values[50:]))
    assert [b - a for a, b in zip(levels, levels[1:], strict=False)] == pytest.approx([5e-4 / 19] * 18)


@pytest.mark.parametrize("rounds", [1, 5, 19])
def test_published_penalty_with_fewer_rounds_than_steps_is_its_last_value_throughout(rounds):
    last = published_penalty_at(999, 1e-3, 20, 1000)
    assert {published_penalty_at(t, 1e-3, 20, rounds) for t in range(rounds)} == {last}


def test_published_penalty_gives_the_remainder_of_the_rounds_to_its_last_segment():
    values = [published_penalty_at(t, 1e-3, 20, 50) for t in range(50)]  # segments of 2 rounds, 10 left over
    lengths = [values.count(level) for level in sorted(set(values))]
    assert lengths == [2] * 19 + [12]


@pytest.mark.parametrize("end", [0.5, 1, 10, 37.5])
def test_cosine_starts_at_its_peak_falls_to_half_midway_and_is_0_from_its_end_on(end):
    assert cosine_at(0, 0.4, end) == 0.4
    values = [cosine_at(t, 0.4, end) for t in range(60)]
    assert values == sorted(values, reverse=True)
    assert all((value > 0) == (t < end) for t, value in enumerate(values))
    assert cosine_at(5, 0.4, 10) == pytest.approx(0.2)


@pytest.mark.parametrize(("t", "value"), [(0, 0.1), (250, 0.0606), (500, 0.0368), (750, 0.0223), (999, 0.0135)])
def test_exponential_learning_rate_decays_every_round(t, value):
    assert Config(lr=0.1, lr_decay=0.998).lr_at(t) == pytest.approx(value, abs=5e-5)


def test_theory_learning_rate_is_one_over_round_times_smoothness():
    config = Config(lr_schedule="theory", smoothness=4.0)
    rates = [config.lr_at(t) for t in range(4)]
    assert rates == [1 / 4, 1 / 8, 1 / 12, 1 / 16]
