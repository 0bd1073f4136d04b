"""Long stacks of layers, a chunk of layers at a time."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from loft_jax.algorithm.platform import Platform, traced_platform

# Elements of arrays larger than a factor that a chunk makes. On a CPU few enough for its cache:
# layers side by side would go through memory between any two operations. On accelerators enough to
# keep a kernel busy for longer than its launch takes, and few beside a model that needs chunks.
_PEAK_ELEMENTS: dict[Platform, int] = {"cpu": 2**20, "gpu": 2**26, "tpu": 2**26}
# Elements of a factor in a chunk, of whose size it holds some ten arrays at once. A cache gains
# nothing there: chunks of 2**20 elements took 1.08 times as long for LLaMA-7B's factored step, and
# a loop takes longer to compile.
_FACTOR_ELEMENTS: dict[Platform, int] = {"cpu": 2**24, "gpu": 2**24, "tpu": 2**24}
# On a mesh the layers may be sharded over devices, which nothing in a traced array says.
_LAYERS_ON_A_MESH = 8


def num_chunks(batch: Sequence[int], factor: int = 0, peak: int = 0) -> int:
    """Returns in how many chunks to take a stack of layers.

    Args:
      batch: the sizes of its batch axes.
      factor: elements of the larger factor of a layer.
      peak: elements of the largest array that a layer makes, 0 where a factor is larger.
    """
    if not batch:
        return 1
    layers, platform = math.prod(batch), traced_platform()
    wanted = max(
        1,
        -(-factor * layers // _FACTOR_ELEMENTS[platform]),
        -(-peak * layers // _PEAK_ELEMENTS[platform]),
    )
    return _divide_layers(batch[_first_long_axis(batch)], wanted, _layers_together())


def map_layers(fn: Callable[..., Any], batch: Sequence[int], chunks: int) -> Callable[..., Any]:
    """Maps ``fn(state, *args) -> state`` of one layer over stacks, chunk by chunk.

    As `map_in_chunks`, except that ``fn`` sees no batch axes. Of a chunk of one layer it gets the
    layer itself: as a batch of one, each array would be copied by one kernel as a matrix, for the
    products, and by another as a batch.

    Example:
      >>> import jax.numpy as jnp
      >>> add = map_layers(lambda total, x: total + x, (4,), 2)
      >>> print(add(jnp.ones(4), jnp.arange(4.0)))
      [1. 2. 3. 4.]
    """
    alone = chunks > 1 and chunks == batch[_first_long_axis(batch)] and _layers_together() == 1
    for _ in batch[alone:]:
        fn = jax.vmap(fn)
    return _loop(fn, batch, chunks, keepdims=not alone)


def map_in_chunks(fn: Callable[..., Any], batch: Sequence[int], chunks: int) -> Callable[..., Any]:
    """Maps ``fn(state, *args) -> state`` of a few layers over those of stacks, chunk by chunk.

    The state is carried through the loop and updated in place: each chunk writes the new state of
    its layers over the old. So there is one copy of it, and temporaries are those of one chunk.

    On a mesh a chunk takes every so many-th layer: where layers are sharded over as many devices as
    a chunk has layers, each device then works on its own layers in every chunk. Elsewhere a chunk
    takes neighbours, which lie together.

    Args:
      fn: takes and returns stacks, with all batch axes, of some of the layers.
      batch: the sizes of the batch axes, which come first in all arrays.
      chunks: a `num_chunks`; with one, ``fn`` gets all layers at once.
    """
    return _loop(fn, batch, chunks, keepdims=True)


def _loop(
    fn: Callable[..., Any], batch: Sequence[int], chunks: int, *, keepdims: bool
) -> Callable[..., Any]:
    if chunks == 1:
        return fn
    axis = _first_long_axis(batch)
    layers = batch[axis] // chunks
    strided = _layers_together() > 1

    def take(x: jax.Array, k: jax.Array) -> jax.Array:
        if strided:
            x = x.reshape(*x.shape[:axis], layers, chunks, *x.shape[axis + 1 :])
            return jax.lax.dynamic_index_in_dim(x, k, axis + 1, keepdims=False)
        x = jax.lax.dynamic_slice_in_dim(x, k * layers, layers, axis)
        return x if keepdims else x.squeeze(axis)

    def write(x: jax.Array, new: jax.Array, k: jax.Array) -> jax.Array:
        if strided:
            parts = x.reshape(*x.shape[:axis], layers, chunks, *x.shape[axis + 1 :])
            return jax.lax.dynamic_update_index_in_dim(parts, new, k, axis + 1).reshape(x.shape)
        # Not through another shape: even a reshape keeps the compiler from working in place.
        new = new if keepdims else jnp.expand_dims(new, axis)
        return jax.lax.dynamic_update_slice_in_dim(x, new, k * layers, axis)

    def mapped(state: Any, *args: Any) -> Any:
        def step(k: jax.Array, state: Any) -> Any:
            state_of_chunk, args_of_chunk = jax.tree.map(lambda x: take(x, k), (state, args))
            new = fn(state_of_chunk, *args_of_chunk)
            return jax.tree.map(lambda x, y: write(x, y, k), state, new)

        return jax.lax.fori_loop(0, chunks, step, state)

    return mapped


def _first_long_axis(batch: Sequence[int]) -> int:
    return next((k for k, size in enumerate(batch) if size > 1), 0)


def _layers_together() -> int:
    """How many layers a chunk takes at least."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = math.prod(mesh.shape[name] for name in set(mesh.axis_names) - set(mesh.manual_axes))
    return _LAYERS_ON_A_MESH if devices > 1 else 1


def _divide_layers(layers: int, wanted: int, together: int) -> int:
    """Returns the least number of chunks from ``wanted`` on that divides the layers, or the most.

    A chunk has at least ``together`` layers, and a multiple of them where that is possible.

    Example:
      >>> _divide_layers(32, 5, 1), _divide_layers(32, 100, 1), _divide_layers(80, 100, 8)
      (8, 32, 10)
    """
    even = [k for k in range(1, layers + 1) if layers % k == 0 and k <= layers // together]
    whole = [k for k in even if (layers // k) % together == 0] or even or [1]
    return min((k for k in whole if k >= wanted), default=max(whole))
