"""The optimizers on a mesh of eight devices, its axis Auto or Explicit: no result depends on it."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optimizers import (
    assert_trees_close,
    every_kind,
    every_optimizer,
    quick,
    random_like,
    small_gradients,
    train,
)
from optimizers import hasty_compiler as hasty_compiler

every_axis_type = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)

# Split along the long axes, and over stacked layers.
SHAPES = {
    "head": (8, 3),
    "long": {"lora_a": (16, 2), "lora_b": (2, 24)},
    "stacked": {"lora_a": (8, 6, 2), "lora_b": (8, 2, 5)},
}
SPECS = {
    "head": P("x", None),
    "long": {"lora_a": P("x", None), "lora_b": P(None, "x")},
    "stacked": {"lora_a": P("x", None, None), "lora_b": P("x", None, None)},
}


def parameters():
    zeros = jax.tree.map(jnp.zeros, SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    return random_like(zeros, 0)


def place(tree, mesh):
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    return jax.device_put(tree, shardings)


@every_axis_type
@every_optimizer
def test_a_mesh_changes_no_result_and_no_sharding(make, axis_type):
    gradients = small_gradients(parameters(), 3)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    tx = make()

    @jax.jit
    def step(gradient, state, params):
        updates, after = tx.update(gradient, state, params)
        assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, params)
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
        return optax.apply_updates(params, updates), after

    with jax.set_mesh(mesh):
        params = place(parameters(), mesh)
        state = tx.init(params)
        split = splits((params, state))
        for gradient in gradients:
            params, state = step(place(gradient, mesh), state, params)
            assert splits((params, state)) == split
    assert_trees_close(jax.device_get(params), jax.device_get(on_one_device(make, 3)))


@functools.cache
def on_one_device(make, steps):
    return train(quick(make), parameters(), small_gradients(parameters(), steps))[0]


def splits(tree):
    """What each device holds of each array; where the counters are is of no account."""
    held = lambda x: str(x.sharding.devices_indices_map(x.shape)) if x.ndim else ""
    return jax.tree.map(held, tree)


@every_kind
def test_explicit_axes_need_no_mesh_in_context(make):
    """As with `optax.adamw`: the arrays know their mesh, though the counters are on none."""
    (gradient,) = small_gradients(parameters(), 1)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    params, gradient = place(parameters(), mesh), place(gradient, mesh)
    tx = make()
    updates, _ = jax.jit(tx.update)(gradient, tx.init(params), params)
    assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, params)
    got = optax.apply_updates(params, updates)
    assert_trees_close(jax.device_get(got), jax.device_get(on_one_device(make, 1)))


@every_kind
def test_injected_hyperparameters_work_on_explicit_axes(make):
    """They are arrays, and on the mesh like all others."""
    (gradient,) = small_gradients(parameters(), 1)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    tx = optax.inject_hyperparams(make.func)(**make.keywords)
    with jax.set_mesh(mesh):
        params, gradient = place(parameters(), mesh), place(gradient, mesh)
        updates, _ = jax.jit(tx.update)(gradient, tx.init(params), params)
        got = optax.apply_updates(params, updates)
    assert_trees_close(jax.device_get(got), jax.device_get(on_one_device(make, 1)))


@every_kind
def test_replicas_of_a_shard_map_do_what_one_device_does(make):
    layer = {"lora_a": jnp.zeros((6, 2)), "lora_b": jnp.zeros((2, 5))}
    params = random_like({"layer": layer}, 0)
    (gradient,) = small_gradients(params, 1)
    tx, mesh = make(), jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    state = tx.init(params)
    mapped = jax.jit(jax.shard_map(tx.update, mesh=mesh, in_specs=P(), out_specs=P()))
    assert_trees_close(
        jax.device_get(mapped(gradient, state, params)),
        jax.device_get(jax.jit(tx.update)(gradient, state, params)),
    )
