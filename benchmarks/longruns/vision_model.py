"""A small Vision Transformer, as pure functions of arrays."""

import math

import jax
import jax.numpy as jnp

from benchmarks.longruns.transformer import Params, apply_layers, init_layers

SIZE, CLASSES = 32, 10
"""Images are 32 x 32 pixels of three colours."""

Batch = dict[str, jax.Array]
"""`images`, uint8 `(n, 32, 32, 3)` or `(n, 32, 32, 1)`, and `labels`, `(n,)`."""


def init(key: jax.Array, layers: int, width: int, patch: int) -> Params:
    """Returns the parameters for patches of `patch` x `patch` pixels."""
    keys = iter(jax.random.split(key, 9))
    normal = lambda *shape: jax.random.normal(next(keys), shape)
    return {
        "patches": normal(3 * patch**2, width) / (3 * patch**2) ** 0.5,
        "positions": 0.02 * normal((SIZE // patch) ** 2, width),
        "layers": init_layers(keys, layers, width),
        "scale": jnp.ones(width),
        "head": normal(width, CLASSES) / width**0.5,
    }


def logits(
    params: Params, adapters: Params | None, images: jax.Array, scale: float = 1.0
) -> jax.Array:
    """Returns the logits of the classes, `(n, 10)`, from the mean of all patches."""
    patch = math.isqrt(params["patches"].shape[0] // 3)
    side = SIZE // patch
    colours = jnp.broadcast_to(images, (*images.shape[:-1], 3))
    pixels = (colours.astype(jnp.float32) - 128) / 64
    split = pixels.reshape(-1, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    x = split.reshape(-1, side**2, 3 * patch**2) @ params["patches"] + params["positions"]
    out = apply_layers(x, params, adapters, scale, causal=False).reshape(x.shape)
    return out.mean(axis=1) @ params["head"]


def loss(params: Params, adapters: Params | None, batch: Batch, scale: float = 1.0) -> jax.Array:
    """Mean cross-entropy in nats an image."""
    log_likelihood = jax.nn.log_softmax(logits(params, adapters, batch["images"], scale))
    targets = batch["labels"].astype(jnp.int32)[:, None]
    return -jnp.mean(jnp.take_along_axis(log_likelihood, targets, axis=-1))


def accuracy(
    params: Params, adapters: Params | None, batch: Batch, scale: float = 1.0
) -> jax.Array:
    """The fraction of the images whose class has the largest logit."""
    found = logits(params, adapters, batch["images"], scale).argmax(axis=-1)
    return jnp.mean(found == batch["labels"])
