"""A step on meshes of several shapes: its numbers, and what crosses devices for them."""

import functools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from layouts import (
    LAYERS,
    LAYOUTS,
    SHAPES,
    M,
    N,
    R,
    abstract,
    largest_array,
    parameters,
    shardings,
)
from layouts import collectives as collectives_of
from optimizers import LOFT
from optimizers import hasty_compiler as hasty_compiler

from loft_jax.sharding import state_shardings

KINDS = [
    "loft_adamw",
    "loft_adamw_factored",
    "loft_adamw_diagonal",
    "loft_sgd_momentum",
    "loft_muon",
    "clipped_loft_adamw",
]
REBUILD = ("loft_adamw", "clipped_loft_adamw")
EXPLICIT = [(name, AxisType.Explicit) for name in ("fsdp=4,tensor=2", "(data,fsdp)=4,tensor=2")]
BOTH = ("loft_adamw", "loft_adamw_factored")
# These two on all layouts, the others where all axes are used.
cases = [(layout, AxisType.Auto, name) for layout in LAYOUTS for name in BOTH]
cases += [(layout, kind, name) for layout, kind in EXPLICIT for name in BOTH]
cases += [("data=2,fsdp=2,tensor=2", AxisType.Auto, name) for name in KINDS if name not in BOTH]
cases += [(*EXPLICIT[0], name) for name in KINDS if name not in BOTH]


def compile_update(tx, layout, axis_type=AxisType.Auto, place=shardings):
    """The compiled update of an optimizer, its parameters and its state, of shapes alone."""
    mesh = layout.mesh(axis_type)
    shape = lambda sizes: jax.ShapeDtypeStruct(sizes, jnp.zeros(0).dtype)
    shapes = jax.tree.map(shape, SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    params = abstract(shapes, place(layout, mesh))
    state = abstract(jax.eval_shape(tx.init, params), state_shardings(tx, params))
    with jax.set_mesh(mesh):
        update = jax.jit(tx.update, donate_argnums=1)
        return update.lower(params, state, params).compile(), params, state


def two_steps(update, params, gradient, state):
    """The updates of two steps, with either factor active."""
    first, state = update(gradient, state, params)
    second, state = update(gradient, state, params)
    return jax.device_get((first, second))


@functools.cache
def on_one_device(name):
    """What the steps give without a mesh."""
    tx = LOFT[name]()
    return two_steps(jax.jit(tx.update), parameters(0), parameters(1), tx.init(parameters(0)))


@pytest.mark.parametrize(("layout", "axis_type", "name"), cases, ids=str)
def test_steps_on_a_mesh_are_those_of_one_device_and_exchange_little(
    layout, axis_type, name, x64, assert_close, report
):
    layout = LAYOUTS[layout]
    program, params, state = compile_update(LOFT[name](), layout, axis_type)
    place = functools.partial(jax.tree.map, lambda x, like: jax.device_put(x, like.sharding))
    arrays = place(parameters(0), params), place(parameters(1), params)
    zeros = place(LOFT[name]().init(parameters(0)), state)
    got = jax.tree.leaves(two_steps(program, *arrays, zeros))
    # Where the first gradients leave a second moment near zero, its cross terms cancel.
    for x, y in zip(got, jax.tree.leaves(on_one_device(name)), strict=True):
        assert_close(x, y, 1e-7, name="meshes of several shapes")
    moved = collectives_of(program.as_text())
    small = LAYERS * R * R
    large = Counter({key: n for key, n in moved.items() if math.prod(key[1]) > small})
    share = lambda x: math.prod(x.sharding.shard_shape(x.shape))
    of_factors = {share(x) for x in jax.tree.leaves(params)}
    assert all(name == "all-reduce" and math.prod(s) in of_factors for name, s in large), large
    # One sum for each factor that is rebuilt over sharded columns; one factor of a pair is active.
    pairs = (("down", "inputs"), ("q", "outputs"), ("stack", "outputs"))
    split = sum((getattr(layout, axis) is not None) for axis in ("inputs", "outputs"))
    assert large.total() == (len(pairs) * split if name in REBUILD else 0)
    assert bool(moved) == (split > 0)  # replicas have nothing to tell each other
    # Nor does a device hold more of a full-size matrix than its own part.
    parts = math.prod(
        layout.shape[axis]
        for axes in (layout.inputs, layout.outputs)
        for axis in ((axes,) if isinstance(axes, str) else axes or ())
    )
    assert largest_array(program.as_text()) <= LAYERS * M * N // parts
    # What comes out lies where it lay: a step can follow on a step.
    for before, after in zip(
        jax.tree.leaves((params, state)), jax.tree.leaves(program.output_shardings), strict=True
    ):
        assert after.is_equivalent_to(before.sharding, len(before.shape))
    temporary = program.memory_analysis().temp_size_in_bytes
    report(f"{name} {layout.shape}: {dict(large)}, {temporary} temporary bytes a device")


def test_factors_over_one_axis_gather_the_basis_and_its_squares():
    """The control: `factor_specs` never makes this layout, and nothing m x n crosses even here."""

    def over_one_axis(layout, mesh):
        longest = lambda s: P(*("fsdp" if size == max(s) else None for size in s))
        specs = jax.tree.map(longest, SHAPES, is_leaf=lambda x: isinstance(x, tuple))
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

    program, *_ = compile_update(LOFT["loft_adamw"](), LAYOUTS["fsdp=8"], place=over_one_axis)
    gathered = {s for name, s in collectives_of(program.as_text()) if name == "all-gather"}
    assert gathered
    assert max(map(math.prod, gathered)) <= LAYERS * max(M, N) * R * (R + 1) // 2
