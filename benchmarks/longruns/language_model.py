"""A byte-level transformer, as pure functions of arrays."""

import jax
import jax.numpy as jnp

from benchmarks.longruns.transformer import Params, apply_layers, init_layers

VOCABULARY = 256


def init(key: jax.Array, layers: int, width: int, length: int) -> Params:
    """Returns the parameters for sequences of at most `length` bytes."""
    keys = iter(jax.random.split(key, 8))
    return {
        "embedding": 0.02 * jax.random.normal(next(keys), (VOCABULARY, width)),
        "positions": 0.02 * jax.random.normal(next(keys), (length, width)),
        "layers": init_layers(keys, layers, width),
        "scale": jnp.ones(width),
    }


def loss(
    params: Params, adapters: Params | None, batch: jax.Array, scale: float = 1.0
) -> jax.Array:
    """Mean cross-entropy in nats a byte of `batch`, `(n, length + 1)` uint8."""
    targets = batch[:, 1:].astype(jnp.int32).reshape(-1, 1)
    log_likelihood = jax.nn.log_softmax(logits(params, adapters, batch, scale))
    return -jnp.mean(jnp.take_along_axis(log_likelihood, targets, axis=-1))


def logits(
    params: Params, adapters: Params | None, batch: jax.Array, scale: float = 1.0
) -> jax.Array:
    """Returns the logits of each next byte, `(n * length, 256)`."""
    inputs = batch[:, :-1].astype(jnp.int32)
    x = params["embedding"][inputs] + params["positions"][: inputs.shape[1]]
    return apply_layers(x, params, adapters, scale, causal=True) @ params["embedding"].T
