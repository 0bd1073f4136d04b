"""Run a function on arrays of an Explicit mesh as if its axes were Auto."""

from collections.abc import Callable
from typing import Any, TypeVar, TypeVarTuple

import jax
from jax.sharding import AxisType, NamedSharding

Arguments = TypeVarTuple("Arguments")
Outputs = TypeVar("Outputs")


def in_auto_axes(
    fn: Callable[[*Arguments], Outputs], *args: *Arguments, out_like: Outputs
) -> Outputs:
    """Calls ``fn(*args)``; on an Explicit mesh, the compiler chooses the inner shardings.

    Under Explicit axes a product that contracts a sharded axis must name its output's sharding.
    Every product of the algorithm would then need a sharding. It is enough to know that each output
    is sharded like the array that it updates.

    Args:
      fn: a function of arrays.
      *args: its arguments, pytrees of arrays.
      out_like: a pytree with the structure of the outputs, whose arrays have their shardings.
    """
    leaves, treedef = jax.tree.flatten(args)
    arrays = {k: x for k, x in enumerate(leaves) if not isinstance(x, (int, float))}
    if not any(_is_explicit(x) for x in arrays.values()):
        return fn(*args)

    def on_arrays(arrays: dict[int, jax.Array]) -> Outputs:
        # Python numbers are not traced: tracing would round them to float32.
        call: Callable[..., Outputs] = fn
        return call(*treedef.unflatten([arrays.get(k, x) for k, x in enumerate(leaves)]))

    mesh = next(jax.typeof(x).sharding.mesh for x in arrays.values() if _is_explicit(x))
    # Scalars created outside of `jax.set_mesh` are not on a mesh yet.
    shardings = jax.tree.map(lambda x: NamedSharding(mesh, jax.typeof(x).sharding.spec), out_like)
    auto: Any = jax.sharding.auto_axes(on_arrays, out_sharding=shardings)
    return auto(arrays)


def _is_explicit(x: jax.typing.ArrayLike) -> bool:
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types
