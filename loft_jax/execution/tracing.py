"""Trace a function once for all groups of one kind, so that compile time follows the kinds."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, TypeVarTuple

import jax

Arguments = TypeVarTuple("Arguments")
Outputs = TypeVar("Outputs")


def traced_once(fn: Callable[[*Arguments], Outputs], *args: *Arguments) -> Outputs:
    """Calls ``fn(*args)``, which is traced once for all arguments of the same types.

    Python numbers stay Python numbers: as arrays they would be rounded to float32.

    Args:
      fn: a function at the top of a module, since it is looked up by its identity.
      *args: pytrees of arrays, Python numbers and static nodes.

    Example:
      >>> import jax.numpy as jnp
      >>> float(traced_once(jnp.add, jnp.ones(()), 2))
      3.0
    """
    leaves, treedef = jax.tree.flatten(args)
    is_number = lambda x: isinstance(x, (bool, int, float))
    numbers = tuple((type(x), x) if is_number(x) else None for x in leaves)
    return _call(fn, treedef, numbers, [x for x in leaves if not is_number(x)])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _call(fn: Callable[..., Any], treedef: Any, numbers: tuple[Any, ...], arrays: list[Any]) -> Any:
    remaining = iter(arrays)
    leaves = [next(remaining) if number is None else number[1] for number in numbers]
    return fn(*treedef.unflatten(leaves))
