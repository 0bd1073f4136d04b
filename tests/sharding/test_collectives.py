"""What crosses devices in a step, read off the compiled program: little, whatever the layout."""

import math
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from layouts import LAYERS, LAYOUTS, SHAPES, M, N, R, abstract, largest_array, shardings
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
both_types = ("fsdp=4,tensor=2", AxisType.Explicit)
cases = [(layout, AxisType.Auto) for layout in LAYOUTS] + [both_types]


def compile_update(tx, layout, axis_type=AxisType.Auto, place=shardings):
    """The compiled update of an optimizer, its parameters and its state, of shapes alone."""
    mesh = layout.mesh(axis_type)
    shape = lambda sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    shapes = jax.tree.map(shape, SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    params = abstract(shapes, place(layout, mesh))
    state = abstract(jax.eval_shape(tx.init, params), state_shardings(tx, params))
    with jax.set_mesh(mesh):
        update = jax.jit(tx.update, donate_argnums=1)
        return update.lower(params, state, params).compile(), params, state


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("layout", "axis_type"), cases, ids=str)
def test_only_small_sums_and_one_moved_factor_cross_devices(layout, axis_type, name, report):
    layout = LAYOUTS[layout]
    program, params, state = compile_update(LOFT[name](), layout, axis_type)
    moved = collectives_of(program.as_text())
    small = LAYERS * R * R
    large = Counter({key: n for key, n in moved.items() if math.prod(key[1]) > small})
    share = lambda x: math.prod(x.sharding.shard_shape(x.shape))
    of_factors = {share(x) for x in jax.tree.leaves(params)}
    assert all(name == "all-reduce" and math.prod(s) in of_factors for name, s in large), large
    # One sum for each factor that is rebuilt over split columns; of a pair one factor moves.
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
