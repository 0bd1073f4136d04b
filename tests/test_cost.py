"""What an update may compute and hold: read off the program, not the clock."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core as jex
from jax.sharding import AxisType
from optimizers import assert_trees_close, compiled, random_like, small_gradients, train
from optimizers import hasty_compiler as hasty_compiler

import loft_jax
from loft_jax import baselines
from loft_jax.algorithm import basis
from loft_jax.execution import chunks

M, N, R = 4096, 3072, 4


def params_of(layers: int = 1, m: int = M, n: int = N) -> dict:
    shape = jax.ShapeDtypeStruct
    return {
        f"layer_{k}": {
            "lora_a": shape((m, R), jnp.float32),
            "lora_b": shape((R, n), jnp.float32),
        }
        for k in range(layers)
    }


def program(params: dict, **options) -> jex.Jaxpr:
    tx = loft_jax.loft_adamw(1e-3, **options)
    state = jax.eval_shape(tx.init, params)
    return jax.make_jaxpr(tx.update)(params, state, params).jaxpr


def equations(jaxpr: jex.Jaxpr, without: tuple[str, ...] = ()):
    """All equations of a program, those of inner programs included, but for those named."""
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name in without:
            continue
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(inner, "eqns"):
                yield from equations(inner.jaxpr if hasattr(inner, "jaxpr") else inner, without)


def with_zeros(jaxpr: jex.Jaxpr, size: int) -> set[str]:
    """The primitives that put zeros in the place of, or next to, arrays of ``size`` or more.

    In branches and loops too an array of zeros may be made, but not the one that is there already.
    """
    is_zero = lambda x: isinstance(x, jex.Literal) and np.ndim(x.val) == 0 and x.val == 0
    return {
        equation.primitive.name
        for equation in equations(jaxpr, without=("cond", "scan", "while"))
        if any(math.prod(v.aval.shape) >= size for v in equation.outvars)
        and any(map(is_zero, equation.invars))
    }


def largest(jaxpr: jex.Jaxpr) -> int:
    return max(math.prod(v.aval.shape) for e in equations(jaxpr) for v in e.outvars)


def branches(jaxpr: jex.Jaxpr) -> list[list[str]]:
    """The names of the primitives in each branch of the conditionals, but those by platform."""
    return [
        [e.primitive.name for e in equations(branch.jaxpr)]
        for conditional in equations(jaxpr)
        if conditional.primitive.name == "cond"
        and conditional.params.get("branches_platforms") is None
        for branch in conditional.params["branches"]
    ]


def test_the_full_update_is_never_held_whole():
    assert largest(program(params_of())) < M * N / 5


def test_without_momentum_the_active_factor_is_the_only_state():
    (state, *_) = jax.eval_shape(loft_jax.loft_sgd(1e-3).init, params_of())
    assert [x.shape for x in jax.tree.leaves(state)] == [()]


@pytest.fixture
def no_small_loops(monkeypatch):
    """Factorizes the Gram matrices as off the CPU: there it is no loop, and tests count loops."""
    monkeypatch.setattr(basis, "_eliminate", basis._cholesky)


@pytest.mark.usefixtures("no_small_loops")
def test_only_the_factor_that_moves_has_full_size_work():
    jaxpr = program(params_of(), balance=False)
    outside = [e.primitive.name for e in jaxpr.eqns]
    assert "scan" not in outside
    # Either moment is calibrated or not, and one of the two factors moves.
    assert sorted(names.count("scan") for names in branches(jaxpr)) == [0, 0, 0, 0, 1, 1]
    both = program(params_of(), alternate=False, balance=False)
    assert [e.primitive.name for e in equations(both)].count("scan") == 2


THIN = {
    "factored": loft_jax.loft_adamw(1e-3, second_moment="factored"),
    "diagonal": loft_jax.loft_adamw(1e-3, second_moment="diagonal"),
    "momentum": loft_jax.loft_sgd(1e-3, momentum=0.9),
    "muon": loft_jax.loft_muon(1e-3),
    "altlora_plus": baselines.altlora_plus(1e-3),
    "scaled_adamw": baselines.scaled_adamw(1e-3),
}


@pytest.mark.parametrize("tx", THIN.values(), ids=THIN)
def test_the_thin_methods_do_nothing_larger_than_the_factors(tx):
    params = params_of()
    jaxpr = jax.make_jaxpr(tx.update)(params, jax.eval_shape(tx.init, params), params).jaxpr
    assert largest(jaxpr) <= (R + 1) * max(M, N)


@pytest.mark.parametrize("second_moment", ["calibrated", "factored", "diagonal"])
def test_the_mathematics_is_compiled_once_for_layers_that_are_alike(second_moment):
    few, many = (
        branches(program(params_of(layers, 64, 48), second_moment=second_moment))
        for layers in (2, 20)
    )
    assert few == many


@pytest.mark.parametrize(
    ("second_moment", "width"),
    [("calibrated", R * (R + 1) // 2), ("factored", 2), ("diagonal", R)],
)
def test_the_state_has_the_size_it_is_documented_to_have(second_moment, width):
    state = jax.eval_shape(
        loft_jax.scale_by_loft_adam(second_moment=second_moment).init, params_of()
    )
    size = sum(math.prod(x.shape) for x in jax.tree.leaves(state[2:]))
    assert size == (M + N) * (2 * R + width)
    plain = optax.scale_by_adam().init(params_of())
    lora = sum(math.prod(x.shape) for x in jax.tree.leaves((plain.mu, plain.nu)))
    assert (second_moment == "factored") == (size <= 1.25 * lora)


STACKED = loft_jax.LoraPairs(axes=loft_jax.LoraAxes(batch=(0,)))


def stacked(layers: int, m: int, n: int) -> dict:
    shape = jax.ShapeDtypeStruct
    return {
        "lora_a": shape((layers, m, R), jnp.float32),
        "lora_b": shape((layers, R, n), jnp.float32),
    }


def test_the_full_updates_of_many_layers_are_not_held_at_once():
    """Nor the terms of their new moments: layers are taken a few at a time, in blocks."""
    layers = 64
    jaxpr = program(stacked(layers, M, N), pairs=STACKED)
    width = R * (R + 1) // 2
    inside = [e for e in equations(jaxpr) if e.primitive.name in ("div", "mul", "gather")]
    largest = max(math.prod(v.aval.shape) for e in inside for v in e.outvars)
    assert layers // 8 * M * width <= largest <= 8 * M * 256


@pytest.mark.parametrize(
    ("layers", "wanted", "together", "expected"),
    [
        (32, 1, 1, 1),
        (32, 4, 1, 4),
        (30, 7, 1, 10),
        (32, 999, 1, 32),
        (32, 999, 8, 4),  # eight layers stay together, for eight devices
        (80, 8, 8, 10),
        (30, 2, 8, 2),
        (30, 999, 8, 3),
        (7, 999, 8, 1),
        (1, 999, 1, 1),
    ],
)
def test_chunks_divide_the_layers(layers, wanted, together, expected):
    assert chunks._divide_layers(layers, wanted, together) == expected


def in_two_layouts(second_moment, alternate):
    """Stacks of sixteen layers on axis 0 and on axis 1, two gradients, and an optimizer of both."""
    pairs = loft_jax.LoraPairs(
        axes=(("second.*", loft_jax.LoraAxes(batch=(1,))), (".*", loft_jax.LoraAxes(batch=(0,))))
    )
    shapes = {
        "first": {"lora_a": (16, 6, 2), "lora_b": (16, 2, 5)},
        "second": {"lora_a": (6, 16, 2), "lora_b": (2, 16, 5)},
    }
    params = random_like(jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple)), 0)
    options = {"alternate": alternate, "pairs": pairs}
    tx = optax.chain(
        loft_jax.clip_by_projected_global_norm(1e-3, **options),
        loft_jax.loft_adamw(0.1, second_moment=second_moment, balance=False, **options),
    )
    return tx, params, small_gradients(params, 2)


@functools.cache
def not_in_chunks(second_moment, alternate):
    """What the tests below compare with: the same without limits, in float64."""
    tx, params, gradients = in_two_layouts(second_moment, alternate)
    return train(compiled(tx), params, gradients)


@pytest.mark.usefixtures("no_small_loops")
@pytest.mark.parametrize(
    ("limit", "alternate"),
    [("_PEAK_ELEMENTS", True), ("_FACTOR_ELEMENTS", True), ("_FACTOR_ELEMENTS", False)],
)
@pytest.mark.parametrize("second_moment", ["calibrated", "factored"])
@pytest.mark.parametrize("devices", [1, 8])
def test_chunks_change_no_number(devices, second_moment, limit, alternate, monkeypatch, x64):
    """Layers on either axis, one at a time, with their bases or without; on a mesh eight."""
    expected = not_in_chunks(second_moment, alternate)  # before the limit is set
    tx, params, gradients = in_two_layouts(second_moment, alternate)
    monkeypatch.setattr(chunks, limit, {"cpu": 1})
    with jax.set_mesh(jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Auto,))):
        jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params).jaxpr
        lengths = [e.params["length"] for e in equations(jaxpr) if e.primitive.name == "scan"]
        # Of two groups: bases in the clip and in the optimizer, and the step; or the step alone.
        larger_than_factors = second_moment == "calibrated"
        loops = 6 if limit == "_FACTOR_ELEMENTS" else 2 * larger_than_factors
        assert lengths == [16 // devices] * loops
        in_chunks = train(compiled(tx), params, gradients)
    assert jax.tree.leaves(in_chunks)[0].dtype == jnp.float64
    assert_trees_close(in_chunks, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("second_moment", ["calibrated", "factored", "diagonal"])
def test_no_zeros_are_kept_beside_the_gradients(second_moment):
    """XLA makes zeros arrays: those that gradients are summed in, kept for whoever asks."""
    tx = optax.chain(
        loft_jax.clip_by_projected_global_norm(1.0),
        loft_jax.loft_adamw(1e-3, second_moment=second_moment),
    )
    params = params_of()
    state = jax.eval_shape(tx.init, params)
    jaxpr = jax.make_jaxpr(tx.update)(params, state, params).jaxpr
    assert with_zeros(jaxpr, N * R) == set()
    with_one = lambda params: jnp.any(params["layer_0"]["lora_a"] != 0)
    assert with_zeros(jax.make_jaxpr(with_one)(params).jaxpr, N * R) == {"ne"}
