"""Run a function on arrays of an Explicit mesh as if its axes were Auto."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding


def in_auto_axes(fn: Callable[..., Any], *args: Any, out_like: Any) -> Any:
    """Calls ``fn(*args)``; on an Explicit mesh, with the compiler choosing inner shardings.

    Under Explicit axes a product that contracts a sharded axis must name its output's sharding.
    Here that would put a sharding beside every product of the mathematics. What is known, and all
    that matters, is that each output is sharded like the array that it updates.

    Args:
      fn: function of arrays.
      *args: its arguments, pytrees of arrays.
      out_like: pytree of the outputs' structure, of arrays with the outputs' shardings.
    """
    leaves, treedef = jax.tree.flatten(args)
    arrays = {k: x for k, x in enumerate(leaves) if not isinstance(x, (int, float))}
    if not any(_is_explicit(x) for x in arrays.values()):
        return fn(*args)

    def on_arrays(arrays: dict[int, jax.Array]) -> Any:
        # Python numbers go round: traced, they would be rounded to float32.
        return fn(*treedef.unflatten([arrays.get(k, x) for k, x in enumerate(leaves)]))

    mesh = next(jax.typeof(x).sharding.mesh for x in arrays.values() if _is_explicit(x))
    # Scalars made outside of `jax.set_mesh` are on no mesh yet.
    shardings = jax.tree.map(lambda x: NamedSharding(mesh, jax.typeof(x).sharding.spec), out_like)
    return jax.sharding.auto_axes(on_arrays, out_sharding=shardings)(arrays)


def _is_explicit(x: jax.typing.ArrayLike) -> bool:
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types
