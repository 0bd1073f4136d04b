"""Packed symmetric matrices: the cross terms of the calibrated second moment (block 4).

For row ``i`` of a factor's moments the second moment needs the symmetric matrix ``P_i`` of cross
terms, since ``(h_i . q_j)^2 = q_j^T h_i h_i^T q_j``. Its ``t = r (r + 1) / 2`` upper entries are
one row of an ``m x t`` array. That is half of the paper's ``m x r^2``, and half its arithmetic.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from loft_jax.algorithm.platform import traced_platform

# From this rank on cross terms are calibrated by two products with T for each row, 4 r^3 FLOPs on
# full matrices. Below, one with the packed T (x) T, 2 t^2, is about as fast and needs less memory.
TWO_PRODUCTS_FROM = 32


def packed_size(r: int) -> int:
    """Number of entries of a packed symmetric ``r x r`` matrix, ``r (r + 1) / 2``."""
    return r * (r + 1) // 2


def unpacking(r: int) -> np.ndarray:
    """Where each entry of a symmetric ``r x r`` matrix is in the packed one, int32 ``(r, r)``.

    Example:
      >>> unpacking(2).tolist()
      [[0, 1], [1, 2]]
    """
    row, col = np.triu_indices(r)
    place = np.zeros((r, r), np.int32)
    place[row, col] = place[col, row] = np.arange(packed_size(r))
    return place


def packed(matrix: Float[Array, "r r"]) -> Float[Array, " t"]:
    """Packs a symmetric matrix.

    Example:
      >>> packed(jnp.array([[4.0, 6.0], [6.0, 9.0]]))
      Array([4., 6., 9.], dtype=float32)
    """
    return matrix[np.triu_indices(matrix.shape[0])]


def packed_outer(h: Float[Array, "m r"]) -> Float[Array, "m t"]:
    """Packs the outer product of each row with itself, ``h_i h_i^T``.

    Example:
      >>> packed_outer(jnp.array([[2.0, 3.0]]))
      Array([[4., 6., 9.]], dtype=float32)
    """
    row, col = np.triu_indices(h.shape[1])
    return _pick_columns(h, row) * _pick_columns(h, col)


def packed_quadratic(q: Float[Array, "n r"]) -> Float[Array, "t n"]:
    """Returns ``phi`` with ``q_j^T P q_j = packed(P) . phi_j``, where ``phi_j`` is a column.

    Off-diagonals count twice. The cross terms are multiplied from the left, so the products are
    made as columns: transposing rows took 2 to 6 % of the calibrated step on a CPU.

    Example:
      >>> packed_quadratic(jnp.array([[2.0, 3.0]]))
      Array([[ 4.],
             [12.],
             [ 9.]], dtype=float32)
    """
    row, col = np.triu_indices(q.shape[1])
    times = jnp.asarray(np.where(row == col, 1.0, 2.0), q.dtype)
    return _pick_rows(q.T, row) * _pick_rows(q.T, col) * times[:, None]


def packed_congruence(matrix: Float[Array, "r k"]) -> Float[Array, "t u"]:
    """Returns ``K`` with ``packed(T^T P T) = packed(P) @ K``: block 4's ``C (x) C``, packed.

    Example:
      >>> packed_congruence(jnp.array([[2.0]]))
      Array([[4.]], dtype=float32)
    """
    row, col = np.triu_indices(matrix.shape[0])
    new_row, new_col = np.triu_indices(matrix.shape[1])
    of_row, of_col = matrix[row], matrix[col]
    once = of_row[:, new_row] * of_col[:, new_col]
    mirrored = of_col[:, new_row] * of_row[:, new_col]
    return once + jnp.where((row != col)[:, None], mirrored, 0)


def calibrate_cross_terms(
    cross: Float[Array, "m t"], matrix: Float[Array, "r k"]
) -> Float[Array, "m u"]:
    """Expresses packed cross terms in a new basis, ``P_i -> T^T P_i T`` (eq. 12, first term).

    Example:
      >>> calibrate_cross_terms(jnp.array([[4.0, 6.0, 9.0]]), jnp.array([[0.0, 1.0], [1.0, 0.0]]))
      Array([[9., 6., 4.]], dtype=float32)
    """
    m, (r, k) = cross.shape[0], matrix.shape
    if r < TWO_PRODUCTS_FROM:
        return cross @ packed_congruence(matrix)
    row, col = np.triu_indices(k)
    once = cross[:, unpacking(r).ravel()].reshape(m * r, r) @ matrix
    twice = jnp.swapaxes(once.reshape(m, r, k), 1, 2).reshape(m * k, r) @ matrix
    return twice.reshape(m, k * k)[:, row * k + col]


def packed_diagonal(cross: Float[Array, "m t"], r: int) -> Float[Array, "m r"]:
    """Returns the diagonals of packed symmetric matrices.

    Example:
      >>> packed_diagonal(jnp.array([[4.0, 6.0, 9.0]]), 2)
      Array([[4., 9.]], dtype=float32)
    """
    row, col = np.triu_indices(r)
    return cross[:, row == col]


# TPUs gather slowly along their lanes: there an exact product with zeros and ones picks.


def _pick_columns(x: Float[Array, "i r"], places: np.ndarray) -> Float[Array, "i t"]:
    """Returns the columns of ``x`` at these places."""
    if traced_platform() == "tpu":
        return x @ jnp.asarray(np.eye(x.shape[1])[:, places], x.dtype)
    return x.at[:, places].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _pick_rows(x: Float[Array, "r j"], places: np.ndarray) -> Float[Array, "t j"]:
    """Returns the rows of ``x`` at these places."""
    if traced_platform() == "tpu":
        return jnp.asarray(np.eye(x.shape[0])[places], x.dtype) @ x
    return x.at[places].get(mode="promise_in_bounds", wrap_negative_indices=False)
