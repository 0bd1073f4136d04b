"""Gradients that overflow: what a wrapper refuses, and what the moments must survive."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import (
    assert_trees_identical,
    random_like,
    small_gradients,
    small_params,
)
from optimizers import hasty_compiler as hasty_compiler

from loft_jax import clip_by_projected_global_norm, loft_adamw

SQUARES = {
    "calibrated": {},
    "factored": {"second_moment": "factored"},
    "diagonal": {"second_moment": "diagonal"},
    "uncalibrated": {"calibrate": False},
    "factored, uncalibrated": {"second_moment": "factored", "calibrate": False},
    "entrywise": {"reconstruct": False},
}


def runner(tx: optax.GradientTransformation) -> Callable[[Any, list[Any]], Any]:
    """Returns ``(params, gradients) ->`` the last parameters and state, with one program."""

    @jax.jit
    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    def run(params, gradients):
        state = tx.init(params)
        for gradient in gradients:
            params, state = step(params, state, gradient)
        return params, state

    return run


@pytest.mark.parametrize("options", SQUARES.values(), ids=SQUARES)
def test_one_gradient_whose_squares_overflow_leaves_no_trace_in_the_moments(options):
    """The step is that of a zero gradient, but for which factor is active next."""
    params = {"layer": small_params()["layer0"]}
    gradients = small_gradients(params, 6)
    run = runner(loft_adamw(1e-2, alternate=False, balance=False, **options))
    spiked, silent = ([*gradients] for _ in range(2))
    spiked[2] = jax.tree.map(lambda x: jnp.sign(x) * 1e25, gradients[2])
    silent[2] = jax.tree.map(jnp.zeros_like, gradients[2])
    after = [run(params, gradients) for gradients in (spiked, silent)]
    same_active = [(got, state[0]._replace(active=jnp.int32(0))) for got, state in after]
    assert_trees_identical(*same_active)


@pytest.mark.parametrize("options", SQUARES.values(), ids=SQUARES)
def test_training_goes_on_after_a_spike(options):
    params = {"layer": small_params()["layer0"]}
    gradients = small_gradients(params, 12)
    run = runner(loft_adamw(1e-2, **options))
    before, _ = run(params, gradients[:5])
    for size in (1e17, 3e19, 1e37):
        spiked = [*gradients]
        spiked[5] = jax.tree.map(lambda x, size=size: x * size, gradients[5])
        after, state = run(params, spiked)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((after, state)))
        leaves = zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True)
        assert 1e-3 < max(float(jnp.abs(x - y).max()) for x, y in leaves) < 1


def if_finite(tx):
    return optax.apply_if_finite(tx, max_consecutive_errors=5)


def skipping_large(tx):
    skip = functools.partial(optax.skip_large_updates, max_squared_norm=1e6)
    return optax.MultiSteps(tx, 1, should_skip_update_fn=skip).gradient_transformation()


def skipping_not_finite(tx):
    return optax.MultiSteps(
        tx, 1, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation()


def clipping(tx):
    return optax.chain(clip_by_projected_global_norm(1.0), tx)


PLAIN = functools.partial(loft_adamw, 0.1, second_moment="factored")
ORDERS = {
    "if_finite(clip)": lambda: if_finite(clipping(PLAIN())),
    "clip(if_finite)": lambda: clipping(if_finite(PLAIN())),
    "skip_not_finite(clip)": lambda: skipping_not_finite(clipping(PLAIN())),
    "clip(skip_not_finite)": lambda: clipping(skipping_not_finite(PLAIN())),
    "if_finite(max_norm)": lambda: if_finite(PLAIN(max_norm=1.0)),
    "skip_large(clip)": lambda: skipping_large(clipping(PLAIN())),
    "skip_large(if_finite(clip))": lambda: skipping_large(if_finite(clipping(PLAIN()))),
    "if_finite(skip_large(clip))": lambda: if_finite(skipping_large(clipping(PLAIN()))),
    "clip(if_finite(skip_large))": lambda: clipping(if_finite(skipping_large(PLAIN()))),
    "clip(skip_large(if_finite))": lambda: clipping(skipping_large(if_finite(PLAIN()))),
    "skip_large(clip(if_finite))": lambda: skipping_large(clipping(if_finite(PLAIN()))),
    "if_finite(clip(skip_large))": lambda: if_finite(clipping(skipping_large(PLAIN()))),
}


@pytest.mark.parametrize("make", ORDERS.values(), ids=ORDERS)
def test_wrappers_in_every_order_refuse_a_step_as_if_it_never_came(make):
    """One entry of one pair overflows, while either factor is active, and twice in a row."""
    params, gradients = small_params(), small_gradients(small_params(), 4)
    infinite, broken = (
        {**gradients[0], "layer1": {**gradients[1]["layer1"], "lora_a": jnp.full((6, 2), bad)}}
        for bad in (jnp.inf, jnp.nan)
    )
    first, second, third, fourth = gradients
    run = runner(make())
    got, state = run(params, [broken, first, infinite, second, infinite, broken, third, fourth])
    expected, clean = run(params, gradients)
    assert_trees_identical(got, expected)
    for name in ("active", "mu", "nu", "basis"):
        fields = [optax.tree.get_all_with_path(tree, name) for tree in (state, clean)]
        assert fields[0], name
        assert_trees_identical(*([value for _, value in field] for field in fields))


def test_a_mixed_tree_under_float16_loss_scaling_skips_overflows_and_goes_on():
    """The float16 pair overflows at large scales, the others do not."""
    dtypes = {"half": jnp.float16, "brain": jnp.bfloat16, "single": jnp.float32}
    shapes = {"lora_a": jnp.zeros((6, 2)), "lora_b": jnp.zeros((2, 5))}
    params = {
        name: random_like(jax.tree.map(lambda x, t=dtype: x.astype(t), shapes), 1)
        for name, dtype in dtypes.items()
    }
    params["mixed"] = {"lora_a": params["half"]["lora_a"], "lora_b": params["single"]["lora_b"]}
    tx = if_finite(clipping(loft_adamw(1e-2)))

    @jax.jit
    def step(params, state, scale):
        def loss(params):
            products = [x["lora_a"] @ x["lora_b"] for x in params.values()]
            return scale * sum(jnp.sum((x.astype(jnp.float32) - 1) ** 2) for x in products)

        gradient = jax.grad(loss)(params)
        gradient = jax.tree.map(lambda g: g.astype(jnp.float32) / scale, gradient)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    def train(scales):
        kept, state = params, tx.init(params)
        for scale in scales:
            kept, state = step(kept, state, jnp.float32(scale))
        return kept, state

    skipped, fits = 2.0**16, 2.0**8
    got, state = train([fits, skipped, fits, skipped, skipped, fits, fits])
    assert int(state.total_notfinite) == 3
    expected, clean = train([fits] * 4)
    assert_trees_identical((got, state.inner_state), (expected, clean.inner_state))
    assert int(clean.inner_state[0].active) == 0


@pytest.mark.parametrize("options", [{}, SQUARES["factored"]], ids=["calibrated", "factored"])
def test_a_count_at_its_largest_stays_there_and_training_goes_on(options):
    """As `optax.safe_increment` has it. The bias corrections are 1 long before."""
    params = {"layer": small_params()["layer0"]}
    tx = loft_adamw(1e-2, nu_dtype="bfloat16", **options)
    state = tx.init(params)
    largest = jnp.int32(2**31 - 1)
    state = (state[0]._replace(count=largest - 1), *state[1:])
    update = jax.jit(tx.update)
    for gradient in small_gradients(params, 3):
        updates, state = update(gradient, state, params)
        sizes = [float(jnp.abs(x).max()) for x in jax.tree.leaves(updates)]
        assert all(np.isfinite(sizes)) and 0 < max(sizes) < 1
    assert state[0].count == largest
