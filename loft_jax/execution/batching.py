"""Small matrices of many stacks, taken as one batch."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from loft_jax.pairs.shard_map import varying


def batched_over_groups(fn: Callable[..., Any], *arguments: Sequence[Array]) -> list[Any]:
    """Maps a function of small matrices over those of several stacks, all that fit at once.

    A program then has the function once, however many stacks there are: it is compiled once, and
    on an accelerator launched once, where these matrices take less time than a launch. On a mesh
    of several devices each stack is taken by itself: to put them together would move them. In a
    `jax.shard_map` on one device only those are put together that differ along the same axes.

    Args:
      fn: of matrices ``(i, j)``, returns a pytree of arrays.
      *arguments: for each argument of ``fn`` its stacks, ``(*batch, i, j)``. The k-th stacks of all
        arguments have the same batch axes.

    Returns:
      For each stack what ``fn`` returns, with the stack's batch axes.

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
        for k, result in zip(members, _of_a_kind(fn, stacks), strict=True):
            results[k] = result
    return results


def _of_a_kind(fn: Callable[..., Any], arguments: Sequence[Sequence[Array]]) -> list[Any]:
    """The same for stacks whose matrices have the same shapes and dtypes."""
    batches = [x.shape[:-2] for x in arguments[0]]
    if len(batches) == 1:
        for _ in batches[0]:
            fn = jax.vmap(fn)
        return [fn(*(stacks[0] for stacks in arguments))]
    join = lambda stacks: jnp.concatenate([x.reshape(-1, *x.shape[-2:]) for x in stacks])
    joined = jax.vmap(fn)(*map(join, arguments))
    ends = [0]
    for batch in batches:
        ends.append(ends[-1] + math.prod(batch))

    def part(k: int) -> Any:
        cut = lambda x: x[ends[k] : ends[k + 1]].reshape(*batches[k], *x.shape[1:])
        return jax.tree.map(cut, joined)

    return [part(k) for k in range(len(batches))]


def _devices() -> int:
    return math.prod(jax.sharding.get_abstract_mesh().shape.values())
