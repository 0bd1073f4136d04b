"""What the peers share: a damped inverse Gram matrix, and a map over the pairs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from loft_jax._pairs import PairedTree
from loft_jax.transforms._factors import compute_dtype, group_pairs


def widen(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns ``x`` in float32, or as it is if that is wider."""
    return x.astype(compute_dtype(x))


def inverse_gram(v: Float[Array, "n r"], damping: float | jax.Array) -> Float[Array, "r r"]:
    """Returns ``inv(V^T V + damping I)``, the pseudo-inverse where rounding makes that singular.

    The damping is absolute, as in the peers' papers. A zero matrix without damping gives zero.

    Example:
      >>> inverse_gram(jnp.array([[1.0, 0.0], [0.0, 3.0]]), 1.0)
      Array([[0.5, 0. ],
             [0. , 0.1]], dtype=float32)
    """
    values, vectors = jnp.linalg.eigh(v.T @ v)
    rounding = v.shape[1] * jnp.finfo(v.dtype).eps * jnp.max(values)
    damped = jnp.maximum(values, 0) + jnp.asarray(damping, v.dtype)
    inverse = jnp.where(damped > rounding, 1 / jnp.where(damped > rounding, damped, 1), 0)
    return (vectors * inverse) @ vectors.T


def over_factors(
    tree: PairedTree,
    params: list[jax.Array],
    gradients: list[jax.Array],
    fn: Callable[..., jax.Array],
    of: str = "ab",
) -> list[Any]:
    """Returns the gradients with those of factors replaced by ``fn(gradient, partner, scale=s)``.

    Args:
      tree, params, gradients: the parameters, and flat lists of their leaves.
      fn: a function of tall matrices, ``(m, r)`` and ``(n, r)``.
      of: the factors to replace, of "a" and "b".
    """
    directions = list(gradients)
    for group in group_pairs(tree):
        for name, (factor, partner) in zip("ab", group.sides, strict=True):
            if name in of:
                mapped = group.over_batch(functools.partial(fn, scale=group.scale))
                direction = mapped(factor.tall(gradients), partner.tall(params))
                factor.put(direction, directions, like=gradients)
    return directions
