"""Batch small matrices of many stacks into one call."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from loft_jax.algorithm.platform import Platform, traced_platform
from loft_jax.pairs.shard_map import varying

# Entries of the matrices that are computed at once where only some are needed: on a CPU enough to
# hide the start of a kernel and few enough for its cache, on accelerators enough to fill them.
_BLOCK_ENTRIES: dict[Platform, int] = {"cpu": 2**13, "gpu": 2**20, "tpu": 2**20}


def batched_over_groups(
    fn: Callable[..., Any],
    *arguments: Sequence[Array],
    indices: Sequence[jax.Array] | None = None,
    where: Sequence[Bool[Array, "..."]] | None = None,
) -> list[Any]:
    """Maps a function of small matrices over several stacks, batching stacks of equal shapes.

    The program then contains the function once per shape, for any number of stacks. It is compiled
    once, and launched once on an accelerator, where such matrices take less time than a launch. On
    a mesh of several devices each stack is mapped separately, since concatenating them would move
    data between devices. In a `jax.shard_map` on one device only stacks that vary along the same
    mesh axes are batched.

    Args:
      fn: a function of matrices ``(i, j)`` that returns a pytree of arrays.
      *arguments: the stacks of each argument of ``fn``, ``(*batch, i, j)``. The k-th stacks of all
        arguments have the same batch axes.
      indices: those of `groups.opaque_indices`, which let all results share one kernel that cuts
        them out of the batch; with None each takes its own.
      where: of each stack, with its batch axes, which matrices are needed; None needs all. It is
        for a function that takes long, and matrices of which few are needed at most steps.

    Returns:
      The result of ``fn`` for each stack, with the batch axes of the stack; zeros for some of the
      matrices that are not needed.

    Example:
      >>> stacks = [jnp.ones((2, 3, 3)), jnp.ones((3, 3)), jnp.ones((1, 2, 2))]
      >>> [x.shape for x in batched_over_groups(lambda x: x @ x, stacks)]
      [(2, 3, 3), (3, 3), (1, 2, 2)]
    """
    together: dict[Any, list[int]] = {}
    for k, stacks in enumerate(zip(*arguments, strict=True)):
        kind = tuple((x.shape[-2:], x.dtype, varying(x)) for x in stacks)
        together.setdefault(k if _devices() > 1 else kind, []).append(k)
    results: list[Any] = [None] * len(arguments[0])
    for members in together.values():
        stacks = [[argument[k] for k in members] for argument in arguments]
        needed = None if where is None else [where[k] for k in members]
        for k, result in zip(members, _of_a_kind(fn, stacks, indices, needed), strict=True):
            results[k] = result
    return results


def _of_a_kind(
    fn: Callable[..., Any],
    arguments: Sequence[Sequence[Array]],
    indices: Sequence[jax.Array] | None,
    where: Sequence[Bool[Array, "..."]] | None,
) -> list[Any]:
    """As `batched_over_groups`, for stacks whose matrices have the same shapes and dtypes."""
    batches = [x.shape[:-2] for x in arguments[0]]
    if len(batches) == 1 and where is None:
        for _ in batches[0]:
            fn = jax.vmap(fn)
        return [fn(*(stacks[0] for stacks in arguments))]
    join = lambda stacks: jnp.concatenate([x.reshape(-1, *x.shape[-2:]) for x in stacks])
    matrices = map(join, arguments)
    if where is None:
        joined = jax.vmap(fn)(*matrices)
    else:
        joined = _where(fn, jnp.concatenate([x.reshape(-1) for x in where]), *matrices)
    sizes = [math.prod(batch) for batch in batches]
    starts = np.cumsum([0, *sizes[:-1]])
    begin = (lambda k: starts[k]) if indices is None else lambda k: jnp.asarray(starts)[indices[k]]

    def part(k: int) -> Any:
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, begin(k), sizes[k])
        return jax.tree.map(lambda x: cut(x).reshape(*batches[k], *x.shape[1:]), joined)

    return [part(k) for k in range(len(batches))]


def _where(fn: Callable[..., Any], needed: Bool[Array, " count"], *matrices: Array) -> Any:
    """Maps a function over the matrices that are needed, a block of them at a time.

    The number of blocks is known to the compiler, so that the result can be differentiated. Those
    in which nothing is needed are skipped.
    """
    count, together = len(needed), jax.vmap(fn)
    size = max(1, _BLOCK_ENTRIES[traced_platform()] // math.prod(matrices[0].shape[1:]))
    if size >= count:
        return together(*matrices)
    order = jnp.argsort(~needed)  # those that are needed come first

    def compute(k: jax.Array, results: Any) -> Any:
        # The last block begins earlier where it would not fit, and computes some once more.
        at = jax.lax.dynamic_slice_in_dim(order, k * size, size)
        new = together(*(x[at] for x in matrices))
        return jax.tree.map(lambda x, y: x.at[at].set(y), results, new)

    def block(k: int | jax.Array, results: Any) -> Any:
        skip = lambda k, results: results
        return jax.lax.cond(k * size < needed.sum(), compute, skip, k, results)

    # Inside a shard_map zeros must vary between devices as what replaces them does.
    zero = jnp.stack([jnp.sum(x[:0]) for x in (needed, *matrices)]).sum()
    shapes = jax.eval_shape(together, *matrices)
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) + zero.astype(x.dtype), shapes)
    return jax.lax.fori_loop(0, -(-count // size), block, empty)


def _devices() -> int:
    return math.prod(jax.sharding.get_abstract_mesh().shape.values())
