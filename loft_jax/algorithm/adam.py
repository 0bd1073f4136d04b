"""The scalars of an Adam step, and Adam's ratio entry by entry."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from loft_jax.algorithm.sharded_dim import ShardedDim


class MomentumScalars(NamedTuple):
    """The scalars of one step of plain momentum, as `AdamScalars` for the first moment alone."""

    correction1: None = None
    ahead: tuple[float | jax.Array, float | jax.Array] | None = None


class AdamScalars(NamedTuple):
    """The scalars of one step.

    Attributes:
      correction1: ``1 - b1^k``, the first moment's bias correction.
      correction2: ``1 - b2^k``, the second moment's.
      ahead: with Nesterov, the weight of the first moment and that of the gradient in what the
        step follows; None without.
      bound: the largest ratio ``|m_hat| / sqrt(v_hat)`` that exact arithmetic allows at step ``k``.
      limit: what the bound tends to without Nesterov.
      eps: Adam's epsilon, outside the square root.
      eps_root: added to ``v_hat``, inside the square root.
    """

    correction1: jax.Array
    correction2: jax.Array
    ahead: tuple[float | jax.Array, float | jax.Array] | None
    bound: jax.Array
    limit: jax.Array
    eps: float | jax.Array
    eps_root: float | jax.Array


def as_scalar(x: float | jax.Array, dtype: jax.typing.DTypeLike) -> float | jax.Array:
    """Returns a number as Python's, which promotes nothing; an array in ``dtype``."""
    return float(x) if isinstance(x, (int, float, np.generic)) else jnp.asarray(x, dtype)


def adam_scalars(
    count: jax.typing.ArrayLike,
    b1: float | jax.Array,
    b2: float | jax.Array,
    eps: float | jax.Array,
    dtype: jax.typing.DTypeLike,
    *,
    eps_root: float | jax.Array = 0.0,
    nesterov: bool = False,
) -> AdamScalars:
    """Returns the scalars of step ``count`` (1 for the first).

    The bound is Cauchy-Schwarz: ``m`` and ``v`` are weighted sums of the same calibrated
    gradients, with weights ``a_i`` and ``b_i``, so ``m_hat^2 / v_hat <= sum_i a_i^2 / b_i``, a
    geometric sum. It is 1 at the first step and tends to 7.3 for ``(0.9, 0.999)``. Rounding in the
    cross terms can push the computed ratio far over it, never the true one.

    Nesterov's step follows ``b1 m / (1 - b1^(k+1)) + (1 - b1) h / (1 - b1^k)``, as
    `optax.scale_by_adam` does, which adds weight to the last gradient.

    Example:
      >>> scalars = adam_scalars(jnp.array(1), 0.9, 0.999, 1e-8, jnp.float32)
      >>> round(float(scalars.bound), 3)
      1.0
      >>> round(float(adam_scalars(jnp.array(10**6), 0.9, 0.999, 1e-8, jnp.float32).bound), 2)
      7.27
    """
    k = jnp.asarray(count, dtype)
    b1, b2, eps, eps_root = (as_scalar(x, dtype) for x in (b1, b2, eps, eps_root))
    correction1, correction2 = one_minus_power(b1, k), one_minus_power(b2, k)
    next1 = one_minus_power(b1, k + 1)
    rest1, rest2 = jnp.asarray(1 - b1, dtype), jnp.asarray(1 - b2, dtype)  # not rounded first
    b1, b2 = jnp.asarray(b1, dtype), jnp.asarray(b2, dtype)
    # b2 = 0 forgets all gradients but the last: bounded only if the first moment does too.
    ratio = jnp.where(b2 > 0, b1**2 / jnp.where(b2 > 0, b2, 1), jnp.where(b1 > 0, jnp.inf, 0))
    finite = jnp.where(jnp.isfinite(ratio) & (ratio != 1), ratio, 0)
    series = jnp.where(ratio == 1, k, (1 - finite**k) / (1 - finite))
    series = jnp.where(jnp.isfinite(ratio), series, jnp.inf)
    squared = (rest1 / correction1) ** 2 * (correction2 / rest2) * series
    limit = rest1**2 / rest2 / jnp.where(ratio < 1, 1 - finite, 0)
    ahead = None
    if nesterov:
        # The weights are c a_i, and d more for the last gradient, whose a_k is d and b_k is e.
        c, d, e = b1 * correction1 / next1, rest1 / correction1, rest2 / correction2
        squared = c**2 * squared + (2 * c + 1) * d**2 / e
        ahead = (b1 / next1, d)
    # The closed form itself rounds; a bound a hair too tight would bend exact steps.
    slack = 1 + 16 * jnp.finfo(dtype).eps
    bound, limit = jnp.sqrt(squared) * slack, jnp.sqrt(limit) * slack
    return AdamScalars(correction1, correction2, ahead, bound, limit, eps, eps_root)


def drop_overflowing_rows(h: Float[Array, "m r"], dim: ShardedDim) -> Float[Array, "m r"]:
    """Returns the scaled gradient with zeros for finite rows whose squares would overflow.

    An infinite second moment stays infinite, and NaN when it is calibrated, while the step still
    looks finite. Such a row does not count for the step, neither in the first moment. Rows with
    infinity or NaN are left as they are, for the step to show them.

    The limit leaves room for the sum of the squares over all rows and for products of ``r x r``
    matrices: ``sqrt(largest / (m r^2))``, 1e16 to 1e18 in float32.

    Example:
      >>> drop_overflowing_rows(jnp.array([[1.0, 2.0], [3.0, 1e19], [jnp.inf, 1.0]]), ShardedDim())
      Array([[ 1.,  2.],
             [ 0.,  0.],
             [inf,  1.]], dtype=float32)
    """
    m, r = dim.size(h.shape[0]), h.shape[1]
    limit = math.sqrt(float(jnp.finfo(h.dtype).max) / (m * r**2))
    largest = jnp.max(jnp.abs(h), axis=1, keepdims=True)
    # A product with a column: XLA would make zeros of the size of the gradient an array.
    return h * jnp.where((largest > limit) & (largest < jnp.inf), 0, 1).astype(h.dtype)


def first_moment_estimate(
    mu: Float[Array, "*shape"], h: Float[Array, "*shape"], scalars: AdamScalars | MomentumScalars
) -> Float[Array, "*shape"]:
    """Returns ``m_hat``, the corrected first moment, with Nesterov one step ahead."""
    if scalars.ahead is not None:
        of_moment, of_gradient = scalars.ahead
        return of_moment * mu + of_gradient * h
    return mu if scalars.correction1 is None else mu / scalars.correction1


def adam_ratio(
    m_hat: Float[Array, "*shape"], v_hat: Float[Array, "*shape"], scalars: AdamScalars
) -> Float[Array, "*shape"]:
    """Returns ``m_hat / (sqrt(v_hat + eps_root) + eps)``, 0 where both are 0.

    Example:
      >>> scalars = adam_scalars(jnp.array(1), 0.9, 0.999, 0.0, jnp.float32)
      >>> h = jnp.array([[3.0, 0.0, -4.0]])
      >>> adam_ratio(h, h**2, scalars).round(5)
      Array([[ 1.,  0., -1.]], dtype=float32)
    """
    # Cancellation in calibrated cross terms can leave a second moment slightly negative.
    denominator = root(jnp.maximum(v_hat, 0), scalars)
    return m_hat / jnp.where(denominator > 0, denominator, 1)


def root(v_hat: Float[Array, "*shape"], scalars: AdamScalars) -> Float[Array, "*shape"]:
    """Returns ``sqrt(v_hat + eps_root) + eps``."""
    # Adding zero would be one more operation on the largest arrays of the step.
    adds_root = not isinstance(scalars.eps_root, (int, float)) or scalars.eps_root != 0
    return jnp.sqrt(v_hat + scalars.eps_root if adds_root else v_hat) + scalars.eps


def entrywise_direction(
    m_hat: Float[Array, "m r"], v_hat: Float[Array, "m r"], bound: jax.Array, scalars: AdamScalars
) -> Float[Array, "m r"]:
    """Returns Adam's ratio of the coordinates in the basis, without rebuilding the full update.

    It depends on the basis, as LoRA's own Adam depends on how ``W`` is factored.
    """
    return jnp.clip(adam_ratio(m_hat, v_hat, scalars), -bound, bound)


def one_minus_power(base: float | jax.Array, k: jax.Array) -> jax.Array:
    """Returns ``1 - base^k``; for a Python number without the rounding of ``base`` to float32.

    0.999 rounded to float32 is wrong by 1.3e-5 of ``1 - 0.999``, which is what counts here.
    """
    if isinstance(base, (int, float)) and 0 < base < 1:
        return -jnp.expm1(k * math.log(base))
    return 1 - jnp.asarray(base, k.dtype) ** k
