"""Eigenvectors of small symmetric matrices by Jacobi's rotations."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Convergence is quadratic at the end: enough for 256 x 256 to single precision. Eigenvectors of
# eigenvalues that are equal to rounding need not settle.
_SWEEPS = 10


def symmetric_eigen(
    matrix: Float[Array, "r r"],
) -> tuple[Float[Array, " r"], Float[Array, "r r"]]:
    """Returns the eigenvalues of a symmetric matrix, in any order, and its eigenvectors as columns.

    Each round rotates ``r / 2`` disjoint pairs of rows and columns, so that ``r - 1`` rounds meet
    every pair once. It has only elementwise work of ``r x r``, batches over layers, and is the same
    on every platform. `jnp.linalg.eigh` calls LAPACK on CPUs, whose batches wait for XLA's own
    threads: two of them beside a model's forward pass can wait for each other for good.

    Source: Brent and Luk, "The solution of singular-value and symmetric eigenvalue problems on
      multiprocessor arrays", SIAM J. Sci. Stat. Comput., 1985.

    Example:
      >>> values, vectors = symmetric_eigen(jnp.array([[2.0, 1.0], [1.0, 2.0]]))
      >>> sorted(values.round(5).tolist())
      [1.0, 3.0]
      >>> bool(jnp.allclose((vectors * values) @ vectors.T, jnp.array([[2, 1], [1, 2]]), atol=1e-5))
      True
    """
    r = matrix.shape[0]
    if r == 1:
        return jnp.diagonal(matrix), jnp.ones_like(matrix)
    # An odd matrix gets a row and a column of zeros, which no rotation mixes with others.
    size = r + r % 2
    padded = jnp.pad(matrix, (0, size - r))
    order = _next_pairs(size)

    def one_round(_: int | jax.Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        matrix, vectors = state
        diagonal, off = jnp.diagonal(matrix), jnp.diagonal(matrix, 1)[::2]
        cosine, sine = _rotation(diagonal[::2], off, diagonal[1::2])

        def rotate(columns: Array) -> Array:
            first, second = columns[:, ::2], columns[:, 1::2]
            both = (cosine * first - sine * second, sine * first + cosine * second)
            return jnp.stack(both, axis=-1).reshape(columns.shape)[:, order]

        return rotate(rotate(matrix).T), rotate(vectors)

    rounds = _SWEEPS * (size - 1)
    # Inside a shard_map the vectors differ between devices as the matrix does.
    eye = jnp.eye(size, dtype=matrix.dtype) + jnp.zeros_like(padded)
    padded, vectors = jax.lax.fori_loop(0, rounds, one_round, (padded, eye))
    return jnp.diagonal(padded)[:r], vectors[:r, :r]


def _rotation(
    p: Float[Array, " pairs"], off: Float[Array, " pairs"], q: Float[Array, " pairs"]
) -> tuple[Float[Array, " pairs"], Float[Array, " pairs"]]:
    """Returns cosine and sine of the smaller rotation that diagonalizes ``[[p, o], [o, q]]``."""
    half = (q - p) / 2
    # tan of the angle: off / (half +- sqrt(half^2 + off^2)), scaled to neither over- nor underflow.
    size = jnp.maximum(jnp.abs(half), jnp.abs(off))
    safe = jnp.where(size > 0, size, 1)
    half, off = half / safe, off / safe
    sign = jnp.where(half < 0, -1, 1)
    denominator = half + sign * jnp.sqrt(half * half + off * off)
    tangent = off / jnp.where(denominator != 0, denominator, 1)
    cosine = 1 / jnp.sqrt(1 + tangent * tangent)
    return cosine, tangent * cosine


def _next_pairs(size: int) -> np.ndarray:
    """How columns move between two rounds of a round-robin tournament of neighbours.

    Example:
      >>> _next_pairs(4).tolist()  # pairs (0, 1), (2, 3), then (0, 3), (1, 2)
      [0, 3, 1, 2]
    """
    upper, lower = np.arange(0, size, 2), np.arange(1, size, 2)
    if size == 2:
        return np.arange(2)
    new_upper = np.concatenate([upper[:1], lower[:1], upper[1:-1]])
    new_lower = np.concatenate([lower[1:], upper[-1:]])
    return np.stack([new_upper, new_lower], axis=1).ravel()
