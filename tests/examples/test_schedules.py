"""The learning rate of each step."""

import numpy as np
import optax
import pytest

from common.schedules import learning_rate_at


def test_the_learning_rate_rises_for_a_tenth_of_the_steps_then_falls_to_zero():
    rates = [learning_rate_at(step, 50, 2.0) for step in range(51)]
    np.testing.assert_allclose(rates[:5], [0.4, 0.8, 1.2, 1.6, 2.0])
    np.testing.assert_allclose(np.diff(rates[5:]), -2.0 / 45)
    assert rates[5] == 2.0 and rates[50] == 0


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 0.1, 0.5, 1, 2, 100])
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_all_steps_have_positive_learning_rates_of_at_most_the_peak(steps, warmup, schedule):
    rates = [learning_rate_at(step, steps, 1.0, warmup, schedule) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", optax.linear_schedule(2.0, 0.0, 30)),
        ("cosine", optax.cosine_decay_schedule(2.0, 30)),
        ("constant", optax.constant_schedule(2.0)),
    ],
)
def test_after_the_warm_up_the_learning_rate_is_that_of_optax(schedule, expected):
    rates = [learning_rate_at(step, 40, 2.0, 10, schedule) for step in range(40)]
    np.testing.assert_allclose(rates[:10], 2 * np.arange(1, 11) / 10)
    np.testing.assert_allclose(rates[10:], [expected(n) for n in range(30)], rtol=1e-5)
    assert [learning_rate_at(n, 30, 2.0, 0, schedule) for n in range(30)] == rates[10:]
    assert rates == [learning_rate_at(step, 40, 2.0, 0.25, schedule) for step in range(40)]
