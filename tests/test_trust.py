"""The trust bound of `gradient_dtype`: what may be rounding of a factor counts as zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimizers import hasty_compiler as hasty_compiler
from optimizers import random_like
from oracles import Hyper, Problem
from trajectories import run

from loft_jax import loft_adamw, loft_muon, loft_sgd, scale_by_loft_adam
from loft_jax.algorithm.basis import orthonormal_basis

PRECISION = 2.0**-8


def factor(singular_values, n=20, seed=0):
    """A factor with these singular values, and its left singular vectors."""
    rng = np.random.default_rng(seed)
    r = len(singular_values)
    left, right = (np.linalg.qr(rng.normal(size=(size, r)))[0] for size in (n, r))
    return left * singular_values @ right.T, left


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("below", [1, 2, 4])
def test_the_basis_spans_the_singular_vectors_above_the_precision(x64, below, scale):
    """Against NumPy's singular value decomposition."""
    values = np.array([3.0, 2.0, 1.0, 0.1, 0.05])
    values[-below:] = 3.0 * PRECISION / np.array([1.5, 10, 1e4, 1e7])[:below]
    v, left = factor(values)
    basis = orthonormal_basis(jnp.asarray(v), scale, precision=PRECISION)
    assert basis.q is not None
    trusted = left[:, : 5 - below]
    np.testing.assert_allclose(basis.q @ basis.q.T, trusted @ trusted.T, rtol=0, atol=1e-10)
    # A step h in the basis is h @ l_inv of the factor: it moves the weight by h q^T, and is
    # orthogonal to the directions that are not trusted.
    h = np.random.default_rng(1).normal(size=(7, 5)) @ np.asarray(basis.q).T @ np.asarray(basis.q)
    np.testing.assert_allclose(h @ basis.l_inv @ (scale * v).T, h @ basis.q.T, rtol=0, atol=1e-9)
    largest = 1 / (scale * values[4 - below])
    assert np.linalg.norm(basis.l_inv, 2) == pytest.approx(largest, rel=1e-8)


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_a_factor_without_small_directions_keeps_its_basis_to_the_last_bit(dtype, x64):
    v, _ = factor(np.geomspace(1, 2 * PRECISION, 6))
    plain, bound = (orthonormal_basis(jnp.asarray(v, dtype), precision=p) for p in (0.0, PRECISION))
    np.testing.assert_array_equal(plain.q, bound.q)
    np.testing.assert_array_equal(plain.l_inv, bound.l_inv)
    zero = orthonormal_basis(jnp.zeros((20, 6), dtype), precision=PRECISION)
    assert not np.any(zero.q) and not np.any(zero.l_inv)


@pytest.mark.parametrize("factored", [False, True], ids=["calibrated", "factored"])
def test_well_conditioned_factors_train_the_same(x64, factored):
    """From a start with both factors; in float64."""
    problem = Problem(9, 7, 3, scale=2.0)
    hyper = Hyper(lr=1e-3, factored=factored)
    plain, bound = (
        run([problem], hyper, 20, balance=False, gradient_dtype=dtype)
        for dtype in (None, "bfloat16")
    )
    for x, y in zip(plain[0], bound[0], strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [loft_adamw, loft_sgd, loft_muon], ids=lambda x: x.__name__)
def test_float32_is_no_bound_and_integers_are_refused(make):
    params = random_like({"lora_a": jnp.zeros((6, 2)), "lora_b": jnp.zeros((2, 5))}, 0)
    program = lambda **options: str(jax.make_jaxpr(lambda p: step(make(0.1, **options), p))(params))
    step = lambda tx, p: tx.update(p, tx.init(p), p)
    assert program() == program(gradient_dtype="float32")
    assert program() != program(gradient_dtype="bfloat16")
    with pytest.raises(TypeError, match="gradient_dtype is a floating-point dtype, got int8"):
        make(0.1, gradient_dtype="int8")


def test_stacked_and_separate_layers_are_bounded_alike():
    """The cores have the bound too, as they cannot balance."""
    tx = scale_by_loft_adam(gradient_dtype="bfloat16")
    layers = {}
    for seed in range(2):
        a, _ = factor([1.0, 0.5, 1e-4], 8, seed)
        b = np.random.default_rng(seed).normal(size=(3, 5))
        layers[f"layer{seed}"] = {"lora_a": jnp.float32(a), "lora_b": jnp.float32(b)}
    stack = lambda apart: jax.tree.map(lambda *x: jnp.stack(x), *apart.values())
    gradients = random_like(layers, 0)
    direction = jax.jit(lambda gradients, params: tx.update(gradients, tx.init(params), params)[0])
    apart, together = direction(gradients, layers), direction(stack(gradients), stack(layers))
    for path, leaf in jax.tree.leaves_with_path(stack(apart)):
        (other,) = (x for other, x in jax.tree.leaves_with_path(together) if other == path)
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-4)
    # b, which moves, gets no step in the direction of a that is not trusted.
    _, _, right = np.linalg.svd(layers["layer0"]["lora_a"])
    assert np.abs(right @ apart["layer0"]["lora_b"])[2].max() < 1e-3
    assert np.abs(right @ apart["layer0"]["lora_b"])[:2].max() > 0.1
