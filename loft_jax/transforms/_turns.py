"""Long stacks of layers, a few layers at a time."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from loft_jax._platform import Platform, platform

# Numbers that a turn makes on its way. On a CPU few enough for its cache: layers side by side would
# go through memory between any two operations. On accelerators enough to keep a kernel busy for
# longer than it takes to launch it, and few beside a model that needs turns.
_TURN_ENTRIES: dict[Platform, int] = {"cpu": 2**20, "gpu": 2**26, "tpu": 2**26}
# Numbers of a factor in a turn: of that size a turn has some ten arrays at once.
_FACTOR_ENTRIES: dict[Platform, int] = {"cpu": 2**20, "gpu": 2**24, "tpu": 2**24}
# On a mesh the layers may be split over devices, which nothing in a traced array says.
_LAYERS_A_TURN_ON_A_MESH = 8


def turn_count(batch: Sequence[int], factor: int, work: int = 0) -> int:
    """Returns in how many turns to take a stack of layers.

    Args:
      batch: the sizes of its batch axes.
      factor: how many numbers the larger factor of a layer has.
      work: how many a layer makes at once, of whatever kind.
    """
    if not batch:
        return 1
    layers, here = math.prod(batch), platform()
    wanted = max(
        -(-entries * layers // at_once[here])
        for entries, at_once in ((factor, _FACTOR_ENTRIES), (work, _TURN_ENTRIES))
    )
    return _turn_count(batch[_long_axis(batch)], wanted, _layers_together())


def in_turns(fn: Callable[..., Any], batch: Sequence[int], turns: int) -> Callable[..., Any]:
    """Maps ``fn(state, *args) -> state`` of a few layers over those of stacks, in so many turns.

    The state goes round in place: each turn writes its layers' new state over the old, so that
    there is one copy of it, and what a turn makes on its way is gone after it.

    On a mesh a turn takes every so many-th layer: where layers are split over as many devices as a
    turn has layers, each device then works on its own in every turn. Elsewhere a turn takes
    neighbours, which lie together.

    Args:
      fn: takes and returns stacks, with all batch axes, of some of the layers.
      batch: the sizes of the batch axes, which come first in all arrays.
      turns: a `turn_count`; with one, ``fn`` has all layers at once.

    Example:
      >>> import jax.numpy as jnp
      >>> add = in_turns(lambda total, x: total + x, (4,), 2)
      >>> print(add(jnp.ones(4), jnp.arange(4.0)))
      [1. 2. 3. 4.]
    """
    if turns == 1:
        return fn
    axis = _long_axis(batch)
    layers = batch[axis] // turns
    strided = _layers_together() > 1

    def take(x: jax.Array, k: jax.Array) -> jax.Array:
        if strided:
            x = x.reshape(*x.shape[:axis], layers, turns, *x.shape[axis + 1 :])
            return jax.lax.dynamic_index_in_dim(x, k, axis + 1, keepdims=False)
        return jax.lax.dynamic_slice_in_dim(x, k * layers, layers, axis)

    def write(x: jax.Array, new: jax.Array, k: jax.Array) -> jax.Array:
        if strided:
            parts = x.reshape(*x.shape[:axis], layers, turns, *x.shape[axis + 1 :])
            return jax.lax.dynamic_update_index_in_dim(parts, new, k, axis + 1).reshape(x.shape)
        # Not through another shape: even a reshape keeps the compiler from working in place.
        return jax.lax.dynamic_update_slice_in_dim(x, new, k * layers, axis)

    def taking_turns(state: Any, *args: Any) -> Any:
        def turn(k: jax.Array, state: Any) -> Any:
            here, of_args = jax.tree.map(lambda x: take(x, k), (state, args))
            return jax.tree.map(lambda x, y: write(x, y, k), state, fn(here, *of_args))

        return jax.lax.fori_loop(0, turns, turn, state)

    return taking_turns


def _long_axis(batch: Sequence[int]) -> int:
    return next((k for k, size in enumerate(batch) if size > 1), 0)


def _layers_together() -> int:
    """How many layers a turn takes at least."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = math.prod(mesh.shape[name] for name in set(mesh.axis_names) - set(mesh.manual_axes))
    return _LAYERS_A_TURN_ON_A_MESH if devices > 1 else 1


def _turn_count(layers: int, wanted: int, together: int) -> int:
    """Returns the least number of turns from ``wanted`` on that divides the layers, or the most.

    A turn has at least ``together`` layers, and a multiple of them where that is possible.

    Example:
      >>> _turn_count(32, 5, 1), _turn_count(32, 100, 1), _turn_count(80, 100, 8)
      (8, 32, 10)
    """
    even = [k for k in range(1, layers + 1) if layers % k == 0 and k <= layers // together]
    whole = [k for k in even if (layers // k) % together == 0] or even or [1]
    return min((k for k in whole if k >= wanted), default=max(whole))
