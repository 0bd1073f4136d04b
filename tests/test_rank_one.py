"""Rows of cross terms that saw one gradient: exact in float32, whatever the order of sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimizers import hasty_compiler as hasty_compiler

from benchmarks.cost.order_of_sums import B1, B2, EPS, cross_terms_alone, direction
from loft_jax.algorithm.adam import adam_scalars
from loft_jax.algorithm.calibrated import separate_rank_one
from loft_jax.algorithm.cross_terms import packed_outer

M, N, R = 96, 128, 8


def dense_direction(q, gradients, count):
    """Adam's direction of the full gradients ``h Q^T``, in the basis, from dense moments."""
    m, v = np.zeros((M, N)), np.zeros((M, N))
    for h in gradients:
        full = h @ q.T
        m, v = B1 * m + (1 - B1) * full, B2 * v + (1 - B2) * full**2
    return (m / (1 - B1**count)) / (np.sqrt(v / (1 - B2**count)) + EPS) @ q


def problem(num_gradients, seed=0):
    draw = np.random.default_rng(seed)
    q = np.linalg.qr(draw.normal(size=(N, R)))[0]
    return q, draw.normal(size=(num_gradients, M, R))


def worst_row(x, y):
    return (np.linalg.norm(x - y, axis=1) / np.linalg.norm(y, axis=1)).max()


@pytest.mark.parametrize("count", [1, 2, 50])
def test_a_first_gradient_at_any_step_is_as_exact_as_float32(count):
    """Entries where ``h . q`` nearly vanishes made single rows wrong by a hundredth."""
    q, gradients = problem(1)
    exact = dense_direction(q, gradients, count)
    orders = [np.arange(R), *(np.random.default_rng(seed).permutation(R) for seed in range(2))]
    of_orders = lambda: [direction(q, gradients, count, jnp.float32, order) for order in orders]
    found = of_orders()
    assert max(worst_row(x, exact) for x in found) < 1e-5
    assert max(worst_row(x, found[0]) for x in found) < 1e-5
    with cross_terms_alone():  # so that the assertions above can fail
        assert max(worst_row(x, exact) for x in of_orders()) > 1e-3


@pytest.mark.parametrize("num_gradients", [1, 2, 5])
def test_the_direction_is_that_of_dense_moments(x64, num_gradients):
    q, gradients = problem(num_gradients)
    exact = dense_direction(q, gradients, num_gradients)
    assert (
        worst_row(direction(q, gradients, num_gradients, jnp.float64, np.arange(R)), exact) < 1e-12
    )


def test_other_rows_keep_their_cross_terms(x64):
    draw = np.random.default_rng(0)
    h = draw.normal(size=(2, 6, 4))
    scalars = adam_scalars(jnp.array(2), B1, B2, EPS, jnp.float64)
    once = packed_outer(jnp.asarray(h[0]))
    cases = {
        "two gradients": (once + packed_outer(jnp.asarray(h[1])), h[0] + h[1]),
        "a moment in another direction": (once, h[1]),  # the second moment forgot it: b2 = 0
        "no moment": (once, 0 * h[0]),
        "no gradient": (0 * once, h[0]),
    }
    for name, (nu, m_hat) in cases.items():
        left, weight = separate_rank_one(nu, jnp.asarray(m_hat), scalars)
        np.testing.assert_array_equal(left, nu, err_msg=name)
        assert not np.any(weight), name


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_rows_are_recognized_at_any_size_of_the_gradient(size):
    draw = np.random.default_rng(0)
    h = jnp.asarray(size * draw.normal(size=(6, 4)), jnp.float32)
    scalars = adam_scalars(jnp.array(1), B1, B2, EPS, jnp.float32)
    one, two = (1 - B2) * packed_outer(h), packed_outer(h) + packed_outer(h[::-1])
    left, weight = separate_rank_one(one, h, scalars)
    assert not np.any(left)
    np.testing.assert_allclose(weight, 1, rtol=1e-5)
    left, weight = jax.jit(separate_rank_one)(two, h + h[::-1], scalars)
    np.testing.assert_array_equal(left, two)
    assert not np.any(weight)
