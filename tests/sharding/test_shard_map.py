"""The optimizers inside `jax.shard_map`, each device with its own part of the factors."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from layouts import collectives
from optimizers import (
    BASELINES,
    LOFT,
    assert_trees_identical,
    every_loft_kind,
    random_like,
    small_gradients,
)
from optimizers import hasty_compiler as hasty_compiler

from loft_jax import LoraPairs, loft_adamw
from loft_jax.algorithm.sharded_dim import ShardedDim, gather_shared_axes
from loft_jax.execution import batching, chunks
from loft_jax.sharding import shard_map_pairs, state_shardings

SHAPES = {
    "both": {"lora_a": (16, 2), "lora_b": (2, 24)},  # one mesh axis splits either factor
    "head": (8, 3),
    "heads": {"lora_a": (6, 3), "lora_b": (3, 4, 5)},
    "stacked": {"lora_a": (8, 6, 2), "lora_b": (8, 2, 5)},
    "wide": {"lora_a": (8, 3), "lora_b": (3, 4)},  # fewer rows a device than the rank
}
SPECS = {
    "both": {"lora_a": P("x"), "lora_b": P(None, ("x", "y"))},
    "head": P("x"),
    "heads": {"lora_a": P(), "lora_b": P(None, "x")},
    "stacked": {"lora_a": P("x"), "lora_b": P("x")},
    "wide": {"lora_a": P("x"), "lora_b": P(None, "y")},
}


def mesh():
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def parameters():
    sizes = lambda x: isinstance(x, tuple)
    return random_like(jax.tree.map(jnp.zeros, SHAPES, is_leaf=sizes), 0)


def in_shard_map(make, params, **options):
    """The update on parts, jitted."""
    of_params = {name: SPECS[name] for name in params}
    tx = make(pairs=shard_map_pairs(params, of_params))
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh(), spec), of_params)
    of_state = jax.tree.map(lambda s: s.spec, state_shardings(tx, params, shardings))
    specs = {"in_specs": (of_params, of_state, of_params), "out_specs": (of_params, of_state)}
    return jax.jit(jax.shard_map(tx.update, mesh=mesh(), **specs, **options))


@every_loft_kind
@pytest.mark.parametrize("in_chunks", [False, True], ids=["at once", "in chunks"])
def test_shards_of_the_factors_do_what_whole_ones_do(
    make, in_chunks, x64, assert_close, monkeypatch
):
    """In float64, and without Optax's state of another layout: parameters and state are equal."""
    if in_chunks:
        for elements in ("_FACTOR_ELEMENTS", "_PEAK_ELEMENTS"):
            monkeypatch.setattr(chunks, elements, {"cpu": 1})
        monkeypatch.setattr(batching, "_BLOCK_ENTRIES", {"cpu": 1})
    params = parameters()
    whole = jax.jit(make().update)
    split = in_shard_map(make, params)
    states = [make().init(params)] * 2
    found = [params] * 2
    for gradient in small_gradients(params, 3):
        for k, update in enumerate((whole, split)):
            updates, states[k] = update(gradient, states[k], found[k])
            found[k] = optax.apply_updates(found[k], updates)
    leaves = zip(
        *(jax.tree.leaves((p, s)) for p, s in zip(found, states, strict=True)), strict=True
    )
    for expected, got in leaves:
        assert_close(got, expected, name="shard_map")


def test_a_gradient_that_overflows_on_one_device_is_refused_on_all():
    """With `apply_if_finite` outside; either factor of one pair, and a leaf that is no factor."""
    params = {name: parameters()[name] for name in ("both", "head")}
    update = in_shard_map(LOFT["loft_adamw"], params)
    tx = optax.apply_if_finite(
        optax.GradientTransformation(LOFT["loft_adamw"]().init, update), max_consecutive_errors=5
    )
    step = jax.jit(tx.update)
    first, second = small_gradients(params, 2)
    broken = [jax.tree.map(lambda x: x, first) for _ in range(3)]
    broken[0]["both"]["lora_a"] = first["both"]["lora_a"].at[9, 0].set(jnp.nan)
    broken[1]["both"]["lora_b"] = first["both"]["lora_b"].at[0, 3].set(jnp.inf)
    broken[2]["head"] = first["head"].at[7, 0].set(-jnp.inf)

    def run(gradients):
        found, state = params, tx.init(params)
        for gradient in gradients:
            updates, state = step(gradient, state, found)
            found = optax.apply_updates(found, updates)
        return found, state

    got, state = run([broken[0], first, *broken[1:], second])
    expected, clean = run([first, second])
    assert int(state.total_notfinite) == 3
    assert_trees_identical((got, state.inner_state), (expected, clean.inner_state))


@every_loft_kind
def test_a_mesh_of_one_device_takes_the_same_program(make):
    """There too, what is split along an axis and what is not are not put together."""
    shapes = {"split": {"lora_a": (8, 6, 2), "lora_b": (8, 2, 5)}}
    shapes["whole"] = {"lora_a": (6, 2), "lora_b": (2, 5)}
    params = jax.tree.map(jnp.ones, shapes, is_leaf=lambda x: isinstance(x, tuple))
    specs = {name: dict.fromkeys(("lora_a", "lora_b"), P("x")) for name in ("split",)}
    specs["whole"] = dict.fromkeys(("lora_a", "lora_b"), P())
    alone = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    tx = make(pairs=shard_map_pairs(params, specs))
    shardings = jax.tree.map(lambda spec: NamedSharding(alone, spec), specs)
    of_state = jax.tree.map(lambda s: s.spec, state_shardings(tx, params, shardings))
    update = jax.shard_map(
        tx.update, mesh=alone, in_specs=(specs, of_state, specs), out_specs=(specs, of_state)
    )
    got, _ = jax.jit(update)(params, tx.init(params), params)
    expected, _ = jax.jit(make().update)(params, make().init(params), params)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_unchecked_replication_is_as_good(x64, assert_close):
    params = parameters()
    (gradient,) = small_gradients(params, 1)
    make = LOFT["loft_adamw_factored"]
    state = make().init(params)
    expected, _ = jax.jit(make().update)(gradient, state, params)
    got, _ = in_shard_map(make, params, check_vma=False)(gradient, state, params)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_close(x, y, name="shard_map")


def test_what_crosses_devices_is_small():
    params = parameters()
    tx = LOFT["loft_adamw"]()
    state = tx.init(params)
    lowered = in_shard_map(LOFT["loft_adamw"], params).lower(params, state, params)
    moved = collectives(lowered.compile().as_text())
    assert moved
    # The basis of a partner over the same axis is gathered: it, and nothing of its square's size.
    gathered = {shape for name, shape in moved if name == "all-gather"}
    assert {math.prod(shape) for shape in gathered} <= {24 * 2 // 2, 16 * 2}
    assert max(math.prod(shape) for name, shape in moved if name != "all-gather") <= 8 * 6 * 2


def test_other_axes_may_be_the_compilers(x64, assert_close):
    """Manual over one mesh axis, Auto over the other: specs of the second say nothing here."""
    params = parameters()["both"]
    whole = {"lora_a": P(("x", "y")), "lora_b": P()}
    manual = {"lora_a": P("x"), "lora_b": P()}
    (gradient,) = small_gradients(params, 1)
    reference = loft_adamw(0.1)
    state = reference.init(params)
    tx = loft_adamw(0.1, pairs=shard_map_pairs(params, whole))
    of_state = jax.tree.map(
        lambda s: s.spec,
        state_shardings(tx, params, jax.tree.map(lambda s: NamedSharding(mesh(), s), manual)),
    )
    update = jax.shard_map(
        tx.update,
        mesh=mesh(),
        in_specs=(manual, of_state, manual),
        out_specs=(manual, of_state),
        axis_names={"x"},
    )
    got, _ = jax.jit(update)(gradient, state, params)
    expected, _ = reference.update(gradient, state, params)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_close(x, y, name="shard_map")


def trace(params, specs, told=None, make=loft_adamw, **options):
    """Traces an update in a shard_map, of which the optimizer is told other specs."""
    pairs = None if told is None else shard_map_pairs(params, told)
    tx = make(learning_rate=0.1, pairs=pairs)
    state = jax.eval_shape(tx.init, params)
    of_state = jax.tree.map(lambda x: P(), state)
    update = functools.partial(
        jax.shard_map, mesh=mesh(), in_specs=(specs, of_state, specs), out_specs=P(), **options
    )(tx.update)
    return jax.eval_shape(update, params, state, params)


PAIR = {"q": {"lora_a": np.ones((16, 2)), "lora_b": np.ones((2, 24))}}
of = lambda a, b: {"q": {"lora_a": a, "lora_b": b}}


@pytest.mark.parametrize(
    ("specs", "told", "message"),
    [
        (of(P("x"), P()), None, r"q/lora_a differs between the devices.* along \['x'\].*in_specs"),
        (of(P("x"), P()), of(P(), P()), r"q/lora_a differs between the devices.* along \['x'\]"),
        (of(P("x"), P()), of(P("z"), P()), "q/lora_a: .*names 'z', which is no axis of the mesh"),
        (of(P("x"), P()), of(P("x", None, "y"), P()), "q/lora_a: .* more axes than the 2"),
        (
            of(P(None, "y"), P()),
            of(P(None, "y"), P()),
            "q/lora_a: .*axis 1 over .*rank axis must stay",
        ),
    ],
)
def test_a_split_that_is_not_said_or_wrongly_is_refused(specs, told, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        trace(PAIR, specs, told)


def test_a_split_of_heads_within_is_refused():
    params = {"lora_a": np.ones((6, 3)), "lora_b": np.ones((3, 4, 4))}
    specs = {"lora_a": P(), "lora_b": P(None, None, "x")}
    with pytest.raises(ValueError, match=r"lora_b: .*axis 2 over .*first row axis"):
        trace(params, specs, specs)


def test_layers_sharded_unlike_their_partner_are_refused():
    params = {"lora_a": np.ones((8, 6, 2)), "lora_b": np.ones((8, 2, 5))}
    specs = {"lora_a": P("x"), "lora_b": P()}
    with pytest.raises(ValueError, match="shards their batch axes differently"):
        trace(params, specs, specs)


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_refuse_sharded_factors(name):
    specs = of(P("x"), P())
    with pytest.raises(ValueError, match="q/lora_a is sharded by a shard_map"):
        trace(PAIR, specs, specs, make=BASELINES[name].func)


def test_a_parameter_that_no_spec_matches_is_refused():
    pairs = LoraPairs(specs=((".*lora_a", P("x")),))
    tx = loft_adamw(0.1, pairs=pairs)
    state = jax.eval_shape(tx.init, PAIR)
    specs = of(P("x"), P())
    update = jax.shard_map(
        tx.update, mesh=mesh(), in_specs=(specs, P(), specs), out_specs=P(), check_vma=False
    )
    with pytest.raises(ValueError, match="q/lora_b: no entry of LoraPairs"):
        jax.eval_shape(update, PAIR, state, PAIR)


def test_specs_are_one_for_each_parameter():
    with pytest.raises(ValueError, match="2 parameters need a tree of as many PartitionSpec"):
        shard_map_pairs(PAIR, {"q": P()})
    pairs = shard_map_pairs(PAIR, P("x"), LoraPairs(scale=2.0))
    assert pairs.scale == 2.0
    assert [spec for _, spec in pairs.specs] == [P("x")] * 2


def test_rows_know_all_rows():
    """The first rows of all and the own part are each other's inverse, over two mesh axes."""
    rows = ShardedDim(("y", "x"))

    def on_device(x):
        whole = rows.take_first(x, rows.size(x.shape[0]))
        other, left = gather_shared_axes(ShardedDim(("x",)), rows, x)
        assert left == ShardedDim(("y",))
        return whole, rows.take_local(whole), left.sum(other.sum(axis=0))

    x = jnp.arange(32.0).reshape(16, 2)
    out = (P(), P(("y", "x")), P())
    mapped = jax.shard_map(
        on_device, mesh=mesh(), in_specs=P(("y", "x")), out_specs=out, check_vma=False
    )
    head, own, total = mapped(x)
    assert np.array_equal(total, x.sum(axis=0))
    assert np.array_equal(head, x)
    assert np.array_equal(own, x)
