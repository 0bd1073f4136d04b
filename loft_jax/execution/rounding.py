"""Numbers in low precision: moments rounded without bias, steps without overflow."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def stochastic_round(
    x: Float[Array, "..."], dtype: jax.typing.DTypeLike, step: jax.typing.ArrayLike
) -> Float[Array, "..."]:
    """Returns ``x`` in ``dtype``; in bfloat16 rounded up or down at random, without bias.

    A second moment that decays by 0.999 changes by a thousandth a step, and neighbours in bfloat16
    are further apart than that: rounded to nearest, it would never change. Rounded up with
    the probability of the part that is cut off, it is right on average, with some noise.

    The random bits come from a hash of the number and of the step, so that the same numbers round
    the same way on any mesh and after any restart, and no random key is needed. Without the step, a
    moment that no gradient changes would be rounded the same way at every step, and stand still.

    Args:
      x: any floating-point array.
      dtype: where it is to be kept. In any other than bfloat16 it is rounded to nearest.
      step: ``()`` integer, another one at each step.

    Example:
      >>> x = jnp.full(1000, 1.001) * (1 + jnp.arange(1000) * 1e-6)  # between 1 and 1.0078125
      >>> kept = stochastic_round(x, jnp.bfloat16, step=1)
      >>> sorted(set(kept.tolist()))
      [1.0, 1.0078125]
      >>> bool(jnp.abs(kept.astype(jnp.float32).mean() - x.mean()) < 3e-4)
      True
    """
    if jnp.dtype(dtype) != jnp.bfloat16:
        return x.astype(dtype)
    x = x.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    random = _hash(bits ^ _hash(jnp.asarray(step).astype(jnp.uint32))) >> 16
    rounded = jax.lax.bitcast_convert_type((bits + random) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(dtype)


def widen(gradients: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns gradients in float32 where their dtype ends too early for a direction, as float16.

    A direction is the step before its learning rate, and divided by a factor that may be tiny: it
    can be a million times the parameter.
    """
    return [x.astype(jnp.float32) if _ends_early(x.dtype) else x for x in gradients]


def narrow(updates: Sequence[jax.Array], like: Sequence[jax.Array]) -> list[jax.Array]:
    """Inverse of `widen`: a number that a dtype cannot hold becomes the largest that it can.

    Example:
      >>> narrow([jnp.array([1e6, -jnp.inf])], [jnp.zeros(2, jnp.float16)])[0].tolist()
      [65504.0, -inf]
    """

    def cast(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        if not _ends_early(dtype):
            return x
        largest = float(jnp.finfo(dtype).max)
        return jnp.where(jnp.isfinite(x), jnp.clip(x, -largest, largest), x).astype(dtype)

    return [cast(x, old.dtype) for x, old in zip(updates, like, strict=True)]


def _ends_early(dtype: jnp.dtype) -> bool:
    return bool(jnp.finfo(dtype).max < jnp.finfo(jnp.bfloat16).max / 2)


def _hash(x: jax.Array) -> jax.Array:
    """Mixes the bits of unsigned 32-bit numbers: the finalizer of MurmurHash3 (public domain)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
