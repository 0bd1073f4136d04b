"""A digest of an array's values that is independent of its sharding.

Each 32-bit lane is mixed with its position by a bijection, and the results are summed modulo 2^32.
Changing one lane therefore always changes the sum. Two such sums miss swapped lanes, or several
changed ones, with probability 2^-64. Sums are order-independent: each device sums its own shard and
no array is gathered.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Odd multipliers of the position, and the constants of two 32-bit finalizers (Murmur3's, and
# "lowbias32" of https://github.com/skeeto/hash-prospector).
_SUMS = (
    (0x9E3779B1, 16, 0x85EBCA6B, 13, 0xC2B2AE35, 16),
    (0x2545F491, 16, 0x7FEB352D, 15, 0x846CA68B, 16),
)


def digests(leaves: dict[str, Any]) -> dict[str, str]:
    """Computes a digest of the bits of each array.

    Shape and dtype are not part of the digest. NumPy arrays are digested on the host, jax.Arrays on
    their devices. If an array spans several processes, all of them must call this together.

    Args:
      leaves: jax.Arrays and NumPy arrays by name, of any shape and any dtype except random keys.

    Returns:
      16 hexadecimal digits for each name.

    Raises:
      ValueError: a random key. Digest `jax.random.key_data` of it.

    Example:
      >>> x = jnp.arange(6.0)
      >>> digests({"x": x, "y": np.arange(6, dtype=np.float32), "z": x[::-1]})
      {'x': '5e44f811b63dcce9', 'y': '5e44f811b63dcce9', 'z': '6f63f487b0524836'}
    """
    return begin_digests(leaves)()


def begin_digests(leaves: dict[str, Any]) -> Callable[[], dict[str, str]]:
    """Begins to compute digests: returns a function that waits for them. Otherwise as `digests`."""
    # On accelerators all are dispatched before the first is waited for.
    sums = {
        path: _begin(x) if isinstance(x, jax.Array) else _sums(np.asarray(x), np)
        for path, x in leaves.items()
    }
    return lambda: {
        path: "".join(f"{int(np.asarray(part)):08x}" for part in pair)
        for path, pair in sums.items()
    }


def _begin(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    sums = _compiled(x)
    devices = x.sharding.device_set
    # Programs that add up over several CPU devices share their threads: with many under way, two
    # processes on a busy machine waited for each other for good.
    if len(devices) > 1 and any(device.platform == "cpu" for device in devices):
        jax.block_until_ready(sums)
    return sums


def _sums(x: Any, xp: Any) -> tuple[Any, Any]:
    """Returns the two sums of an array. ``xp`` is NumPy or jax.numpy."""
    lanes = _lanes(x, xp)
    # Counted from 1, so that a leading zero changes the sums.
    position = _linear_index(x.shape, xp) * np.uint32(len(lanes)) + np.uint32(1)
    with np.errstate(over="ignore"):
        first, second = (
            sum(
                xp.sum(_mix(lane, position + np.uint32(k), *constants), dtype=np.uint32)
                for k, lane in enumerate(lanes)
            )
            for constants in _SUMS
        )
    # Scalars, which are replicated on all devices.
    return first, second


@jax.jit
def _compiled(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Compiled once per shape, dtype and sharding, which the layers of a model share.
    return _sums(x, jnp)


def _mix(lane, position, odd, shift1, factor1, shift2, factor2, shift3):
    h = lane ^ (position * np.uint32(odd))
    h = (h ^ (h >> np.uint32(shift1))) * np.uint32(factor1)
    h = (h ^ (h >> np.uint32(shift2))) * np.uint32(factor2)
    return h ^ (h >> np.uint32(shift3))


def _linear_index(shape: tuple[int, ...], xp: Any) -> Any:
    """Returns the row-major position of each element, modulo 2^32."""
    index = xp.zeros(shape, np.uint32)
    for axis, size in enumerate(shape):
        along = xp.arange(size, dtype=np.uint32).reshape([-1] + [1] * (len(shape) - axis - 1))
        index = index * np.uint32(size % 2**32) + along
    return index


def _lanes(x: Any, xp: Any) -> list[Any]:
    """Returns the bits of the elements as arrays of uint32, each of the shape of ``x``."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return [*_lanes(xp.real(x), xp), *_lanes(xp.imag(x), xp)]
    if x.dtype == jnp.bool_:
        x = x.astype(np.uint8)
    elif jnp.issubdtype(x.dtype, jnp.integer) and jnp.iinfo(x.dtype).bits < 8:
        x = x.astype(np.int8)  # NumPy stores them in a byte each
    elif jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 8:
        x = x.astype(np.float32)
    bits = 8 * x.dtype.itemsize
    if bits <= 32:
        return [_bitcast(x, np.dtype(f"uint{bits}"), xp).astype(np.uint32)]
    words = _bitcast(x, np.dtype(np.uint32), xp)
    return [words[..., k] for k in range(bits // 32)]


def _bitcast(x: Any, dtype: np.dtype, xp: Any) -> Any:
    if xp is not np:
        return jax.lax.bitcast_convert_type(x, dtype)
    words = np.ascontiguousarray(x).reshape(-1).view(dtype)
    wider = x.dtype.itemsize // dtype.itemsize
    return words.reshape((*x.shape, wider) if wider > 1 else x.shape)
