"""Shared by the baselines: damped inverse Gram matrices, and a map over the pairs."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from loft_jax.execution.batching import batched_over_groups
from loft_jax.execution.groups import compute_dtype, group_pairs
from loft_jax.pairs.find import PairedTree


def widen(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns ``x`` in float32, or unchanged if its dtype is wider."""
    return x.astype(compute_dtype(x))


class Spectrum(NamedTuple):
    """Eigenvalues, ``(r,)``, and eigenvectors in columns, ``(r, r)``, of a Gram matrix."""

    values: Float[Array, " r"]
    vectors: Float[Array, "r r"]


def gram_spectra(factors: Sequence[Array]) -> list[Spectrum]:
    """Returns the spectra of ``V^T V`` of stacks of factors, computed in one call.

    The single call prevents a deadlock. On CPUs a LAPACK call occupies a thread of XLA's pool while
    it waits for work that it puts into the same pool. If all threads of the pool run such calls,
    they can wait forever.

    Args:
      factors: each ``(*batch, n, r)``, floating point.

    Returns:
      The spectra of each stack, with its batch axes, in its dtype.

    Example:
      >>> (spectrum,) = gram_spectra([jnp.array([[1.0, 0.0], [0.0, 3.0]])])
      >>> spectrum.values
      Array([1., 9.], dtype=float32)
    """
    grams = [jnp.swapaxes(v, -1, -2) @ v for v in factors]
    return batched_over_groups(lambda gram: Spectrum(*jnp.linalg.eigh(gram)), grams)


def inverse_gram(gram: Spectrum, damping: float | jax.Array) -> Float[Array, "r r"]:
    """Returns ``inv(V^T V + damping I)``, or the pseudo-inverse where rounding makes it singular.

    The damping is absolute, as in the baselines' papers. A zero matrix without damping gives zero.

    Example:
      >>> (gram,) = gram_spectra([jnp.array([[1.0, 0.0], [0.0, 3.0]])])
      >>> inverse_gram(gram, 1.0)
      Array([[0.5, 0. ],
             [0. , 0.1]], dtype=float32)
    """
    values, vectors = gram
    rounding = len(values) * jnp.finfo(values.dtype).eps * jnp.max(values)
    damped = jnp.maximum(values, 0) + jnp.asarray(damping, values.dtype)
    inverse = jnp.where(damped > rounding, 1 / jnp.where(damped > rounding, damped, 1), 0)
    return (vectors * inverse) @ vectors.T


def over_factors(
    tree: PairedTree,
    params: list[jax.Array],
    gradients: list[jax.Array],
    fn: Callable[..., jax.Array],
    of: str = "ab",
) -> list[Any]:
    """Replaces the gradients of factors by ``fn(gradient, gram, scale=s)``; returns all gradients.

    Args:
      tree, params, gradients: the pairs, and flat lists of the leaves of parameters and gradients.
      fn: a function of the gradient as a matrix, ``(m, r)``, and its partner's `Spectrum`.
      of: the factors whose gradients are replaced: "a", "b" or "ab".
    """
    directions = list(gradients)
    factors = [
        (group, own, partner)
        for group in group_pairs(tree)
        for own, partner in ("ab", "ba")
        if own in of
    ]
    grams = gram_spectra([group.matrices(partner, params) for group, _, partner in factors])
    for (group, own, _), gram in zip(factors, grams, strict=True):
        mapped = group.kind.over_batch(functools.partial(fn, scale=group.kind.scale))
        group.put_matrices(own, mapped(group.matrices(own, gradients), gram), directions, gradients)
    return directions
