"""The active factor: first steps, steps without a gradient, and agreement with clipping."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import hasty_compiler as hasty_compiler
from oracles import AdamLeaf, Hyper, Problem

import loft_jax

RNG = np.random.default_rng(0)
X, Y = jnp.asarray(RNG.normal(size=(16, 6))), jnp.asarray(RNG.normal(size=(16, 2)))
PARAMS = {
    "lora_a": jnp.asarray(RNG.normal(size=(6, 2))),
    "lora_b": jnp.zeros((2, 5)),
    "head": jnp.zeros((5, 2)),
}


def loss(params):
    hidden = jnp.tanh(X @ (jnp.ones((6, 5)) / 6 + params["lora_a"] @ params["lora_b"]))
    return jnp.mean((hidden @ params["head"] - Y) ** 2)


# Balance moves the factor that rests, too.
adamw = functools.partial(loft_jax.loft_adamw, balance=False)


def moved_factors(tx, steps: int, loss=loss, params=PARAMS) -> list[str]:
    """Returns the factors that moved at each step."""
    state, moved = tx.init(params), []
    for _ in range(steps):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        moved.append("".join(f for f in "ab" if (updates[f"lora_{f}"] != 0).any()))
        params = optax.apply_updates(params, updates)
    return moved


def test_a_zero_head_delays_one_step_and_keeps_the_active_factor():
    # Step 1 has no gradient for the adapter in any method. Strict alternation would activate a at
    # step 2, while its partner is still zero, and move nothing until step 3.
    assert moved_factors(adamw(0.1, weight_decay=0.0), 5) == ["", "b", "a", "b", "a"]


def test_with_a_trained_head_the_first_step_moves_a_factor():
    params = PARAMS | {"head": jnp.ones((5, 2))}
    tx = adamw(0.1)
    assert moved_factors(tx, 4, params=params) == ["b", "a", "b", "a"]


def test_starting_with_the_factor_that_has_no_gradient_delays_one_step():
    params = PARAMS | {"head": jnp.ones((5, 2))}
    tx = adamw(0.1, weight_decay=0.0, moves_first="a")
    assert moved_factors(tx, 4, params=params) == ["", "b", "a", "b"]


def test_without_alternation_both_move_once_both_have_gradients():
    params = PARAMS | {"head": jnp.ones((5, 2))}
    tx = adamw(0.1, weight_decay=0.0, alternate=False)
    assert moved_factors(tx, 3, params=params) == ["b", "ab", "ab"]


def test_only_the_active_factor_decays():
    params = PARAMS | {"head": jnp.ones((5, 2)), "lora_b": jnp.ones((2, 5))}
    tx = adamw(0.1, weight_decay=0.5)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates["lora_b"], -0.1 * 0.5 * params["lora_b"], rtol=1e-6)
    assert not updates["lora_a"].any()


def test_clipping_to_zero_keeps_the_active_factor_of_clipping_and_optimizer():
    """A norm that overflows clips finite gradients to zero, so the optimizer gets no gradient."""
    tx = optax.chain(loft_jax.clip_by_projected_global_norm(0.1), loft_jax.loft_adamw(0.1))
    params = {"lora_a": jnp.eye(6, 2, dtype="float32"), "lora_b": jnp.eye(2, 5, dtype="float32")}
    spike = jax.tree.map(lambda x: jnp.full_like(x, 1e25), params)
    _, (clip, (core, *_)) = tx.update(spike, tx.init(params), params)
    assert int(clip.active) == int(core.active) == 0


def test_clipping_and_optimizer_agree_on_the_active_factor():
    tx = optax.chain(loft_jax.clip_by_projected_global_norm(0.1), loft_jax.loft_adamw(0.1))
    params, state = PARAMS, tx.init(PARAMS)
    for k in range(6):
        grads = jax.grad(loss)(params)
        if k == 3:
            grads = jax.tree.map(jnp.zeros_like, grads)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        clip_state, (core, *_) = state
        # The active factor does not change at step 0 (zero head) and step 3 (zero gradients).
        assert int(clip_state.active) == int(core.active) == [0, 1, 0, 0, 1, 0][k]
        assert int(core.count) == k + 1


@pytest.mark.parametrize("second_moment", ["calibrated"])
def test_steps_without_a_gradient_keep_full_rank_exact(second_moment, x64, assert_close):
    problem = Problem(6, 6, 6, seed=3)
    reference = AdamLeaf(problem.weight(problem.u, problem.v), Hyper())
    tx = loft_jax.loft_adamw(0.05, weight_decay=0.0, second_moment=second_moment)
    params = {"lora_a": jnp.asarray(problem.u), "lora_b": jnp.asarray(problem.v.T)}
    state, update = tx.init(params), jax.jit(tx.update)
    for k in range(20):
        u, v = np.asarray(params["lora_a"]), np.asarray(params["lora_b"]).T
        g = problem.gradient(problem.weight(u, v), k) * (k not in (0, 1, 7, 12))
        reference.step(g)
        updates, state = update({"lora_a": g @ v, "lora_b": u.T @ g}, state, params)
        params = optax.apply_updates(params, updates)
        w = problem.w0 + np.asarray(params["lora_a"] @ params["lora_b"])
        assert_close(w, reference.w)
