"""Causal attention whose scores are never held whole.

On a GPU with 16-bit weights, the fused kernel of cuDNN computes it. Elsewhere, blocks of queries
are computed one after another, and the backward pass computes the scores of a block again instead
of keeping them, as FlashAttention does.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

MIN_BLOCK, MAX_BLOCKS = 128, 8
"""Smallest number of queries in a block, and the largest number of blocks of a sequence."""


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    segments: jax.Array | None = None,
) -> jax.Array:
    """Mixes the values of earlier positions, as `jax.nn.dot_product_attention` does.

    Args:
        q: queries, `(batch, length, heads, head_dim)`.
        k: keys, `(batch, length, kv_heads, head_dim)`; each serves heads / kv_heads queries.
        v: values, with the shape of `k`.
        scale: the factor of the scores.
        window: the number of positions that a query sees, its own included; None for all.
        segments: the segment of each position, int32 `(batch, length)`. A query sees only keys of
            its own segment. None if each row is one sequence.

    Returns:
        An array with the shape of `q`.
    """
    length = q.shape[1]
    if window is not None and window >= length:
        window = None
    if _is_fused(q):
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=None if segments is None else _same_segment(segments, segments),
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            scale=scale,
            implementation="cudnn",
        )
    size = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
    blocks = []
    for begin in range(0, length, size):
        end = min(begin + size, length)
        first = 0 if window is None else max(0, begin - window + 1)
        run = functools.partial(_block, begin=begin - first, scale=scale, window=window)
        of_queries, of_keys = (
            None if segments is None else segments[:, places]
            for places in (slice(begin, end), slice(first, end))
        )
        keys, values = k[:, first:end], v[:, first:end]
        blocks.append(jax.checkpoint(run)(q[:, begin:end], keys, values, of_queries, of_keys))
    return jnp.concatenate(blocks, axis=1)


def _block(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segments: jax.Array | None,
    k_segments: jax.Array | None,
    *,
    begin: int,
    scale: float,
    window: int | None,
) -> jax.Array:
    """Attention of some queries; `begin` is the place of the first query among the keys."""
    distance = begin + np.arange(q.shape[1])[:, None] - np.arange(k.shape[1])
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    mask = jnp.asarray(seen)[None, None]
    if q_segments is not None and k_segments is not None:
        mask = mask & _same_segment(q_segments, k_segments)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale)


def _same_segment(q_segments: jax.Array, k_segments: jax.Array) -> jax.Array:
    """Bool `(batch, 1, queries, keys)`."""
    return q_segments[:, None, :, None] == k_segments[:, None, None, :]


def _is_fused(q: jax.Array) -> bool:
    """Whether cuDNN's kernel applies: a GPU, 16-bit floats, and a head size that it supports."""
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return half and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0 and jax.default_backend() == "gpu"
