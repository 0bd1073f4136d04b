"""Run a function on arrays of an Explicit mesh as if its axes were Auto."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType


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
    arrays = jax.tree.leaves(args)
    if not any(_is_explicit(x) for x in arrays):
        return fn(*args)
    shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, out_like)
    return jax.sharding.auto_axes(fn, out_sharding=shardings)(*args)


def _is_explicit(x: jax.typing.ArrayLike) -> bool:
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types
