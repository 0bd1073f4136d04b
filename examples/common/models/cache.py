"""A cache of keys and values, so that generating a token does not compute the earlier ones again.

The sequences of a batch end at the same slot of the cache. Shorter ones have padding before them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx


class Shape(Protocol):
    """What a cache needs to know of a model's config."""

    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


class Cache(NamedTuple):
    """The keys and values of all layers, and the slots that are in use."""

    keys: jax.Array
    """`(layers, batch, slots, kv_heads, head_dim)`."""
    values: jax.Array
    """The shape of `keys`."""
    first: jax.Array
    """The first slot of each sequence, int32 `(batch,)`; the slots before it are padding."""
    filled: jax.Array
    """The number of slots in use, int32 scalar."""

    @classmethod
    def empty(cls, first: jax.Array, slots: int, config: Shape, dtype: Any) -> "Cache":
        """A cache without tokens for sequences that begin at the slots `first`.

        Args:
            first: int32 `(batch,)`.
            slots: the most tokens of a sequence, its padding included.
            config: of the model.
            dtype: of the keys and values.
        """
        heads = (config.num_key_value_heads, config.head_dim)
        zeros = jnp.zeros((config.num_hidden_layers, len(first), slots, *heads), dtype)
        return cls(zeros, zeros, first, jnp.int32(0))

    def positions(self, new: int) -> jax.Array:
        """The positions of the next `new` tokens in their sequences, int32 `(batch, new)`."""
        return jnp.maximum(self.filled + jnp.arange(new) - self.first[:, None], 0)


class CachedAttention:
    """Adds the keys and values of one layer to a cache, and attends to all of them.

    An object, because a layer returns only its output: `cache` is the result after the call.
    """

    def __init__(self, cache: Cache, layer: jax.Array):
        """For the layer with that number, int32 scalar."""
        self.cache, self._layer = cache, layer

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        *,
        scale: float,
        window: jax.Array | int | None = None,
        segments: jax.Array | None = None,
    ) -> jax.Array:
        """Arguments as `attention.attend`; the rows must not hold several sequences."""
        if segments is not None:
            raise ValueError("a cache holds one sequence in each row: pass segments=None")
        cache = self.cache
        begin = (self._layer, 0, cache.filled, 0, 0)
        add = lambda all_, new: jax.lax.dynamic_update_slice(
            all_, new[None].astype(all_.dtype), begin
        )
        self.cache = cache._replace(keys=add(cache.keys, k), values=add(cache.values, v))
        keys, values = self.cache.keys[self._layer], self.cache.values[self._layer]
        slots = jnp.arange(keys.shape[1])
        queries = cache.filled + jnp.arange(q.shape[1])[:, None]
        seen = (slots <= queries) & (slots >= cache.first[:, None, None])
        if window is not None:
            seen &= queries - slots < window
        keys, values = keys.astype(q.dtype), values.astype(q.dtype)
        return jax.nn.dot_product_attention(q, keys, values, mask=seen[:, None], scale=scale)


def extend_layers(
    layers: nnx.Module,
    x: jax.Array,
    cache: Cache,
    apply: Callable[..., jax.Array],
    *each: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Applies stacked layers to new tokens, which attend to those in a cache too.

    Args:
        layers: made by `stacking.stack`.
        x: the input of the first layer, `(batch, new, hidden)`.
        cache: holds the tokens before them.
        apply: applies one layer: (layer, its input, its `CachedAttention`, rows of `each`).
        *each: arrays whose rows belong to the layers.

    Returns:
        The output of the last layer, and the cache with the new tokens.
    """
    graphdef, weights = nnx.split(layers)

    def run(carry: tuple[jax.Array, Cache], of_layer: Any) -> Any:
        (x, cache), (index, weights, *each) = carry, of_layer
        attend = CachedAttention(cache, index)
        x = apply(nnx.merge(graphdef, weights), x, attend, *each)
        return (x, attend.cache), None

    indices = jnp.arange(len(cache.keys))
    (x, cache), _ = jax.lax.scan(run, (x, cache), (indices, weights, *each))
    return x, cache._replace(filled=cache.filled + x.shape[1])
