"""PiSSA, LoRA-GA and rsLoRA, against the papers' formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimizers import hasty_compiler as hasty_compiler

from loft_jax.baselines._initialization import lora_ga_init, pissa_init, rslora_scale

SHAPES = {"tall": (14, 9, 3), "wide": (9, 14, 3), "square": (8, 8, 4), "rank one": (7, 5, 1)}
every_shape = pytest.mark.parametrize(("m", "n", "r"), SHAPES.values(), ids=SHAPES.keys())
every_scale = pytest.mark.parametrize("scale", [1.0, 0.25, 4.0])


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def signed_svd(w):
    """The decomposition with the signs that the package promises."""
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    for k in range(len(s)):
        if u[np.abs(u[:, k]).argmax(), k] < 0:
            u[:, k], vt[k] = -u[:, k], -vt[k]
    return u, s, vt


@pytest.mark.usefixtures("x64")
@every_scale
@every_shape
def test_pissa_is_the_principal_part_of_the_weight(m, n, r, scale, assert_close):
    w = draw(m, n)
    u, s, vt = signed_svd(w)
    got = pissa_init(jnp.asarray(w), r, scale)
    assert_close(got.a, u[:, :r] * np.sqrt(s[:r] / scale))
    assert_close(got.b, np.sqrt(s[:r] / scale)[:, None] * vt[:r])
    assert_close(got.residual, u[:, r:] * s[r:] @ vt[r:])  # the paper's eq. (4)


@pytest.mark.usefixtures("x64")
@every_scale
@every_shape
def test_lora_ga_is_the_leading_directions_of_the_gradient(m, n, r, scale, assert_close):
    w, g = draw(m, n), draw(m, n, seed=1)
    u, _, vt = signed_svd(g)
    got = lora_ga_init(jnp.asarray(w), jnp.asarray(g), r, scale, gamma=5.0)
    size = n**0.25 / 5.0**0.5
    a, b = size * u[:, :r], size * vt[r : 2 * r]
    assert_close(got.a, a)
    assert_close(got.b, b)
    assert_close(got.residual, w - scale * a @ b)


@pytest.mark.usefixtures("x64")
@every_scale
@every_shape
def test_residual_and_adapter_are_the_weight(m, n, r, scale, assert_close):
    w, g = jnp.asarray(draw(m, n)), jnp.asarray(draw(m, n, seed=1))
    for residual, a, b in (pissa_init(w, r, scale), lora_ga_init(w, g, r, scale)):
        assert_close(residual + scale * a @ b, w)


@pytest.mark.usefixtures("x64")
@every_shape
def test_the_first_step_of_lora_ga_is_the_best_approximation_of_rank_2r(m, n, r, assert_close):
    """Theorem 3.1: no adapter of rank r can follow the full gradient step more closely."""
    scale, gamma, target = 0.5, 9.0, draw(m, n, seed=1)
    loss = lambda w: jnp.sum(jnp.log(jnp.cosh(w - target)))
    w = jnp.asarray(draw(m, n))
    g = np.asarray(jax.grad(loss)(w))
    residual, a, b = lora_ga_init(w, jnp.asarray(g), r, scale, gamma=gamma)
    da, db = jax.grad(lambda a, b: loss(residual + scale * a @ b), argnums=(0, 1))(a, b)
    step = scale * (da @ b + a @ db)  # of the weight, for an infinitesimal learning rate
    u, s, vt = np.linalg.svd(g, full_matrices=False)
    best = u[:, : 2 * r] * s[: 2 * r] @ vt[: 2 * r]
    assert_close(step, scale**2 * n**0.5 / gamma * best)
    other = np.linalg.qr(draw(m, r, seed=2))[0], np.linalg.qr(draw(n, r, seed=3))[0].T
    projected = g @ other[1].T @ other[1] + other[0] @ other[0].T @ g
    assert np.linalg.norm(g - projected) > np.linalg.norm(g - best)


@pytest.mark.usefixtures("x64")
def test_rslora_divides_by_the_root_of_the_rank(assert_close):
    assert_close([rslora_scale(3.0, r) for r in (1, 2, 9)], [3.0, 3.0 / 2**0.5, 1.0])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        rslora_scale(1.0, 0)


@pytest.mark.usefixtures("x64")
def test_subspace_iterations_approach_the_exact_decomposition(assert_close):
    w = jnp.asarray(np.linalg.qr(draw(40, 40))[0][:, :30] * 0.8 ** np.arange(30))
    exact, fast = pissa_init(w, 4), pissa_init(w, 4, iterations=40)
    for got, expected in zip(fast, exact, strict=True):
        assert_close(got, expected)
    rough = pissa_init(w, 4, iterations=0)
    assert_close(rough.residual + rough.a @ rough.b, w)


@pytest.mark.usefixtures("x64")
def test_a_stack_of_layers_is_mapped_over_and_compiled(assert_close):
    w, g = jnp.asarray(draw(3, 8, 6)), jnp.asarray(draw(3, 8, 6, seed=1))
    for init in (
        lambda w, g: pissa_init(w, 2, 0.5),
        lambda w, g: pissa_init(w, 2, iterations=2),
        lambda w, g: lora_ga_init(w, g, 2),
    ):
        together = jax.jit(jax.vmap(init))(w, g)
        for k in range(3):
            for got, expected in zip(together, init(w[k], g[k]), strict=True):
                assert_close(got[k], expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_low_precision_computes_in_float32(dtype):
    w, g = jnp.asarray(draw(32, 24), dtype), jnp.asarray(draw(32, 24, seed=1), dtype)
    eps = float(jnp.finfo(dtype).eps)
    for init in (
        lambda w, **options: pissa_init(w, 4, 2.0, **options),
        lambda w, **options: lora_ga_init(w, g.astype(w.dtype), 4, 2.0, **options),
    ):
        residual, a, b = init(w)
        assert {x.dtype for x in (residual, a, b)} == {jnp.dtype(dtype)}
        wide = init(w.astype(jnp.float32))
        np.testing.assert_allclose(np.float32(a), wide.a, atol=2 * eps, rtol=eps)
        # The residual makes up for the rounding of the factors: the sum is off by its own alone.
        sum_ = np.float32(residual) + 2.0 * np.float64(a) @ np.float64(b)
        np.testing.assert_allclose(sum_, np.float32(w), atol=8 * eps)
        mixed = init(w, dtype="float32")
        assert (mixed.residual.dtype, mixed.a.dtype, mixed.b.dtype) == (dtype, "float32", "float32")


def test_what_does_not_fit_is_refused():
    w = jnp.ones((6, 4))
    with pytest.raises(ValueError, match="rank 5 .* needs 5 singular vectors"):
        pissa_init(w, 5)
    with pytest.raises(ValueError, match="rank 3 .* needs 6 singular vectors"):
        lora_ga_init(w, w, 3)
    with pytest.raises(ValueError, match="at least 1"):
        pissa_init(w, 0)
    with pytest.raises(ValueError, match=r"gradient has shape \(4, 6\), the kernel \(6, 4\)"):
        lora_ga_init(w, w.T, 1)
    with pytest.raises(ValueError, match=r"one matrix .* \(2, 6, 4\)"):
        pissa_init(jnp.ones((2, 6, 4)), 1)
