"""The teaching version, `examples/minimal_loft.py`, takes the same steps as the package.

The two use different bases, so their rounding differs. It grows most where b starts at zero: the
calibrated second moment then holds a single gradient at step 2, `v_ij = (h_i . q_j)^2`, computed as
`q_j^T P_i q_j` with the relative error `eps |h_i|^2 / (h_i . q_j)^2`. The seeds below have no entry
`h_i . q_j` so close to zero that this would hide a difference of 1e-12 in the weights.
"""

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import hasty_compiler as hasty_compiler

import loft_jax

PATH = Path(__file__).parents[1] / "examples" / "minimal_loft.py"
SPEC = importlib.util.spec_from_file_location("minimal_loft", PATH)
minimal_loft = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(minimal_loft)

STEPS = 32
LR = 0.02
TOLERANCE = 1e-12


def make_params(shapes, zero_b=False, seed=0):
    """Returns the layers `layer<i>`, each with a pair of factors of shape (m, r) and (r, n)."""
    rng = np.random.default_rng(seed)
    params = {}
    for i, (m, n, r) in enumerate(shapes):
        b = np.zeros((r, n)) if zero_b else rng.normal(size=(r, n))
        params[f"layer{i}"] = {"lora_a": jnp.asarray(rng.normal(size=(m, r))), "lora_b": b}
    return jax.tree.map(jnp.asarray, params)


def make_loss(params, scale, seed=1):
    """Returns a loss of the parameters and the step: each step has a random batch of its own.

    A chain of layers tanh(x (W0 + scale a b)), with the head, if there is one, after the last.
    """
    rng = np.random.default_rng(seed)
    shapes = [(x["lora_a"].shape[0], x["lora_b"].shape[1]) for _, x in layers_of(params)]
    bases = [jnp.asarray(rng.normal(size=shape) / shape[0] ** 0.5) for shape in shapes]
    inputs = jnp.asarray(rng.normal(size=(STEPS, 8, shapes[0][0])))
    outputs = params["head"].shape[1] if "head" in params else shapes[-1][1]
    targets = jnp.asarray(rng.normal(size=(STEPS, 8, outputs)))

    def loss(params, k):
        x = inputs[k]
        for base, (_, layer) in zip(bases, layers_of(params), strict=True):
            x = jnp.tanh(x @ (base + scale * layer["lora_a"] @ layer["lora_b"]))
        if "head" in params:
            x = x @ params["head"] + params["bias"]
        return jnp.sum((x - targets[k]) ** 2)

    return loss


def layers_of(params):
    return sorted((name, x) for name, x in params.items() if name.startswith("layer"))


def trajectory(tx, params, loss):
    """Returns the parameters after each step, stacked."""

    def step(carry, k):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, k), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    run = lambda params: jax.lax.scan(step, (params, tx.init(params)), jnp.arange(STEPS))[1]
    return jax.jit(run)(params)


def both(params, second_moment, scale=1.0, weight_decay=0.0):
    """Returns the trajectories of the teaching version and of the package."""
    ours = minimal_loft.minimal_loft_adamw(
        LR, weight_decay=weight_decay, scale=scale, second_moment=second_moment
    )
    package = loft_jax.loft_adamw(
        learning_rate=LR,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=weight_decay,
        second_moment=second_moment,
        balance=False,
        pairs=loft_jax.LoraPairs(scale=scale),
    )
    loss = make_loss(params, scale)
    return trajectory(ours, params, loss), trajectory(package, params, loss)


def assert_same_leaves(assert_close, got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert jnp.abs(y[-1] - y[0]).max() > LR  # every leaf was trained
        assert_close(x, y, TOLERANCE)


def weights(params):
    """Returns the products a b of the only layer, one for each step."""
    return params["layer0"]["lora_a"] @ params["layer0"]["lora_b"]


SECOND_MOMENTS = pytest.mark.parametrize("second_moment", ["calibrated", "factored"])


@SECOND_MOMENTS
@pytest.mark.parametrize("rank", [1, 3, "full"])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)], ids=str)
def test_ranks_and_shapes(x64, assert_close, shape, rank, second_moment):
    params = make_params([(*shape, min(shape) if rank == "full" else rank)])
    assert_same_leaves(assert_close, *both(params, second_moment))


@SECOND_MOMENTS
@pytest.mark.parametrize("zero_b", [False, True])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7)], ids=str)
def test_scale_weight_decay_and_a_zero_b(x64, assert_close, shape, zero_b, second_moment):
    params = make_params([(*shape, 2)], zero_b, seed=4)
    assert_same_leaves(assert_close, *both(params, second_moment, 2.5, 0.1))


@SECOND_MOMENTS
def test_two_adapters_and_other_leaves(x64, assert_close, second_moment):
    params = make_params([(6, 8, 2), (8, 5, 2)], zero_b=True, seed=3)
    head = np.random.default_rng(2).normal(size=(5, 2))
    params |= {"head": jnp.asarray(head), "bias": jnp.zeros(2)}
    assert_same_leaves(assert_close, *both(params, second_moment, 0.5, 0.1))


@SECOND_MOMENTS
def test_a_factor_that_has_lost_rank_moves_the_weight_alike(x64, assert_close, second_moment):
    """The factors themselves may differ: the package's inverse is another generalized one."""
    params = make_params([(7, 5, 3)])
    layer = params["layer0"]
    layer["lora_b"] = layer["lora_b"].at[2].set(layer["lora_b"][0] - layer["lora_b"][1])
    ours, package = map(weights, both(params, second_moment))
    assert_close(ours, package, TOLERANCE)


@SECOND_MOMENTS
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)], ids=str)
def test_full_rank_on_both_sides(x64, assert_close, shape, second_moment):
    """Rank max(m, n): the weight moves as the package's, and with calibration as AdamW's."""
    params = make_params([(*shape, max(shape))])
    ours, package = map(weights, both(params, second_moment))
    assert_close(ours, package, TOLERANCE)
    if second_moment == "calibrated":
        loss, eye = make_loss(params, 1.0), jnp.eye(shape[1])
        of_weight = lambda w, k: loss({"layer0": {"lora_a": w, "lora_b": eye}}, k)
        adamw = optax.adamw(LR, weight_decay=0.0)
        full = trajectory(adamw, weights(params), of_weight)
        assert_close(ours, full, TOLERANCE, "full rank, AdamW on the weight")


@SECOND_MOMENTS
def test_zero_factors_rest(second_moment):
    params = {"lora_a": jnp.zeros((4, 2)), "lora_b": jnp.zeros((2, 3))}
    tx = minimal_loft.minimal_loft_adamw(LR, second_moment=second_moment)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        assert not any(x.any() for x in jax.tree.leaves(updates))


def test_the_script_prints_what_it_promises(x64, capsys):
    minimal_loft.main()
    head, *rows, last = capsys.readouterr().out.splitlines()
    names = ["AdamW", "LoFT s=1", "LoFT s=8", "factored s=1", "LoRA s=1", "LoRA s=8"]
    assert re.split(r"\s{2,}", head.strip()) == ["step", *names]
    table = np.array([row.split() for row in rows], float)
    np.testing.assert_array_equal(table[:, 0], [0, 25, 50, 100, 200])
    adamw, loft, loft_at_8, factored, lora, lora_at_8 = table[1:, 1:].T
    # LoFT follows AdamW at any scale; LoRA's speed depends on it.
    np.testing.assert_array_equal(loft, loft_at_8)
    assert (abs(np.log(loft / adamw)) < 0.5).all() and (abs(np.log(factored / adamw)) < 1).all()
    assert lora[-1] > 1e3 * lora_at_8[-1]
    assert float(re.search(r"full rank.* <= (\S+) in float64", last)[1]) <= 1e-12


def test_the_file_is_short_and_imports_nothing_of_the_package():
    source = PATH.read_text()
    assert len(source.splitlines()) <= 220
    modules = set(re.findall(r"^(?:import|from) (\S+)", source, flags=re.MULTILINE))
    assert modules == {"typing", "jax", "jax.numpy", "optax"}
