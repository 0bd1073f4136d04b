"""Calibrated moments in the orthonormal basis, with the cross terms packed.

``h`` (``m x r``) is the projected gradient in the basis, ``G P_V = h Q^T``. The first moment is
linear in it. The second needs, for row ``i``, the symmetric matrix ``P_i`` of cross terms, since
``(h_i . q_j)^2 = q_j^T h_i h_i^T q_j``; its ``t = r (r + 1) / 2`` upper entries are one row of
``cross`` (``m x t``). Half of the paper's ``m x r^2``, and half its arithmetic.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from loft_jax._platform import platform

# From this rank on cross terms are transported by two products with T for each row, 4 r^3 FLOPs on
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


def packed_outer(h: Float[Array, "m r"]) -> Float[Array, "m t"]:
    """Packs the outer product of each row with itself, ``h_i h_i^T``.

    Example:
      >>> packed_outer(jnp.array([[2.0, 3.0]]))
      Array([[4., 6., 9.]], dtype=float32)
    """
    row, col = np.triu_indices(h.shape[1])
    return _pick_columns(h, row) * _pick_columns(h, col)


def packed_quadratic(q: Float[Array, "n r"]) -> Float[Array, "t n"]:
    """Returns ``phi`` with ``q_j^T P q_j = packed(P) . phi_j``, ``phi_j`` being its columns.

    Off-diagonals count twice. Made as columns, since cross terms meet them from the left: rows
    would have to be turned around first, which took 2 to 6 % of the calibrated step on a CPU.

    Example:
      >>> packed_quadratic(jnp.array([[2.0, 3.0]]))
      Array([[ 4.],
             [12.],
             [ 9.]], dtype=float32)
    """
    row, col = np.triu_indices(q.shape[1])
    times = jnp.asarray(np.where(row == col, 1.0, 2.0), q.dtype)
    return _pick_rows(q.T, row) * _pick_rows(q.T, col) * times[:, None]


def _pick_columns(x: Float[Array, "i r"], places: np.ndarray) -> Float[Array, "i t"]:
    """Returns the columns of ``x`` at these places.

    TPUs gather slowly along their lanes: there by an exact product with zeros and ones.
    """
    if platform() == "tpu":
        return x @ jnp.asarray(np.eye(x.shape[1])[:, places], x.dtype)
    return x.at[:, places].get(mode="promise_in_bounds")


def _pick_rows(x: Float[Array, "r j"], places: np.ndarray) -> Float[Array, "t j"]:
    """The same for rows."""
    if platform() == "tpu":
        return jnp.asarray(np.eye(x.shape[0])[places], x.dtype) @ x
    return x.at[places].get(mode="promise_in_bounds")


def packed_congruence(transport: Float[Array, "r r"]) -> Float[Array, "t t"]:
    """Returns ``K`` with ``packed(T^T P T) = packed(P) @ K``: block 4's ``C (x) C``, packed.

    Example:
      >>> packed_congruence(jnp.array([[2.0]]))
      Array([[4.]], dtype=float32)
    """
    row, col = np.triu_indices(transport.shape[-1])
    of_row, of_col = transport[row], transport[col]
    once = of_row[:, row] * of_col[:, col]
    mirrored = of_col[:, row] * of_row[:, col]
    return once + jnp.where((row != col)[:, None], mirrored, 0)


def transport_cross_terms(
    cross: Float[Array, "m t"], transport: Float[Array, "r r"]
) -> Float[Array, "m t"]:
    """Carries packed cross terms into a new basis, ``P_i -> T^T P_i T`` (eq. 12, first term).

    Example:
      >>> transport_cross_terms(jnp.array([[4.0, 6.0, 9.0]]), jnp.array([[0.0, 1.0], [1.0, 0.0]]))
      Array([[9., 6., 4.]], dtype=float32)
    """
    m, r = cross.shape[0], transport.shape[0]
    if r < TWO_PRODUCTS_FROM:
        return cross @ packed_congruence(transport)
    row, col = np.triu_indices(r)
    once = cross[:, unpacking(r).ravel()].reshape(m * r, r) @ transport
    twice = jnp.swapaxes(once.reshape(m, r, r), 1, 2).reshape(m * r, r) @ transport
    return twice.reshape(m, r * r)[:, row * r + col]


def accumulate_cross_terms(
    cross: Float[Array, "m t"], h: Float[Array, "m r"], b2: float | jax.Array
) -> Float[Array, "m t"]:
    """Adds a gradient to transported cross terms (eq. 12, second term)."""
    return b2 * cross + (1 - b2) * packed_outer(h)


def as_scalar(x: float | jax.Array, dtype: jax.typing.DTypeLike) -> float | jax.Array:
    """Returns a number as Python's, which promotes nothing; an array in ``dtype``."""
    return float(x) if isinstance(x, (int, float, np.generic)) else jnp.asarray(x, dtype)


class AdamStep(NamedTuple):
    """The scalars of one Adam step.

    Attributes:
      correction1: ``1 - b1^k``, the first moment's bias correction.
      correction2: ``1 - b2^k``, the second moment's.
      bound: largest ``|m_hat| / sqrt(v_hat)`` that exact arithmetic allows at step ``k``.
      limit: what the bound tends to.
      eps: Adam's epsilon, outside the square root.
    """

    correction1: jax.Array
    correction2: jax.Array
    bound: jax.Array
    limit: jax.Array
    eps: float | jax.Array


def adam_step(
    count: jax.typing.ArrayLike,
    b1: float | jax.Array,
    b2: float | jax.Array,
    eps: float | jax.Array,
    dtype: jax.typing.DTypeLike,
) -> AdamStep:
    """Returns the scalars of step ``count`` (1 for the first).

    The bound is Cauchy-Schwarz: ``m`` and ``v`` are weighted sums of the same transported
    gradients, with weights ``a_i`` and ``b_i``, so ``m_hat^2 / v_hat <= sum_i a_i^2 / b_i``, a
    geometric sum. It is 1 at the first step and tends to 7.3 for ``(0.9, 0.999)``. Rounding in the
    cross terms can push the computed ratio far over it, never the true one.

    Example:
      >>> step = adam_step(jnp.array(1), 0.9, 0.999, 1e-8, jnp.float32)
      >>> round(float(step.bound), 3)
      1.0
      >>> round(float(adam_step(jnp.array(10**6), 0.9, 0.999, 1e-8, jnp.float32).bound), 2)
      7.27
    """
    k = jnp.asarray(count, dtype)
    b1, b2, eps = (as_scalar(x, dtype) for x in (b1, b2, eps))
    correction1, correction2 = _one_minus_power(b1, k), _one_minus_power(b2, k)
    rest1, rest2 = jnp.asarray(1 - b1, dtype), jnp.asarray(1 - b2, dtype)  # not rounded first
    b1, b2 = jnp.asarray(b1, dtype), jnp.asarray(b2, dtype)
    # b2 = 0 forgets all gradients but the last: bounded only if the first moment does too.
    ratio = jnp.where(b2 > 0, b1**2 / jnp.where(b2 > 0, b2, 1), jnp.where(b1 > 0, jnp.inf, 0))
    finite = jnp.where(jnp.isfinite(ratio) & (ratio != 1), ratio, 0)
    series = jnp.where(ratio == 1, k, (1 - finite**k) / (1 - finite))
    series = jnp.where(jnp.isfinite(ratio), series, jnp.inf)
    squared = (rest1 / correction1) ** 2 * (correction2 / rest2) * series
    limit = rest1**2 / rest2 / jnp.where(ratio < 1, 1 - finite, 0)
    # The closed form itself rounds; a bound a hair too tight would bend exact steps.
    slack = 1 + 16 * jnp.finfo(dtype).eps
    return AdamStep(
        correction1, correction2, jnp.sqrt(squared) * slack, jnp.sqrt(limit) * slack, eps
    )


def _one_minus_power(base: float | jax.Array, k: jax.Array) -> jax.Array:
    """Returns ``1 - base^k``; for a Python number without the rounding of ``base`` to float32.

    0.999 rounded to float32 is wrong by 1.3e-5 of ``1 - 0.999``, which is what counts here.
    """
    if isinstance(base, (int, float)) and 0 < base < 1:
        return -jnp.expm1(k * math.log(base))
    return 1 - jnp.asarray(base, k.dtype) ** k
