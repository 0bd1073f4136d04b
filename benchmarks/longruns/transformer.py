"""Stacked transformer layers with adapters on all of their kernels, as pure functions of arrays."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from loft_jax.baselines import dora_init, dora_output

HEADS = 4
Params = dict[str, Any]


def init_layers(keys: Iterator[jax.Array], layers: int, width: int) -> Params:
    """Returns the layers; the weights that adapters adapt are those named `kernel`."""
    kernel = lambda m, n: {"kernel": jax.random.normal(next(keys), (layers, m, n)) / m**0.5}
    return {
        "query": kernel(width, width),
        "key": kernel(width, width),
        "value": kernel(width, width),
        "out": kernel(width, width),
        "up": kernel(width, 4 * width),
        "down": kernel(4 * width, width),
        "scale1": jnp.ones((layers, width)),
        "scale2": jnp.ones((layers, width)),
    }


def new_adapters(key: jax.Array, params: Params, rank: int, magnitude: bool = False) -> Params:
    """Returns LoRA's factors of all kernels: random `lora_a`, zero `lora_b`.

    Args:
      magnitude: adds DoRA's `lora_magnitude`, `(layers, n)`.
    """
    adapters = {}
    for name, entry in params["layers"].items():
        if not isinstance(entry, dict):
            continue
        key, of_a = jax.random.split(key)
        layers, m, n = entry["kernel"].shape
        a = jax.random.normal(of_a, (layers, m, rank)) / m**0.5
        adapters[name] = {"lora_a": a, "lora_b": jnp.zeros((layers, rank, n))}
        if magnitude:
            adapters[name]["lora_magnitude"] = jax.vmap(dora_init)(entry["kernel"])
    return {"layers": adapters}


def apply_layers(
    x: jax.Array, params: Params, adapters: Params | None, scale: float, causal: bool
) -> jax.Array:
    """Applies the layers to `x`, `(batch, tokens, width)`, with `scale * A B` on each kernel.

    Returns:
      The normalized output, `(batch * tokens, width)`.
    """
    # One long axis of tokens, and no loop over the layers: on a CPU the gradients then take 0.4 of
    # the time.
    shape, x = x.shape, x.reshape(-1, x.shape[-1])
    of_layers = None if adapters is None else adapters["layers"]

    def layer(x: jax.Array, weights: tuple[Params, Params | None]) -> tuple[jax.Array, None]:
        own, adapter = weights

        def linear(name: str, x: jax.Array) -> jax.Array:
            added = None if adapter is None else adapter[name]
            return adapted(x, own[name]["kernel"], added, scale)

        heads = lambda y: y.reshape(*shape[:-1], HEADS, -1)
        normed = _normalize(x) * own["scale1"]
        query, key, value = (heads(linear(name, normed)) for name in ("query", "key", "value"))
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=causal)
        x = x + linear("out", mixed.reshape(x.shape))
        hidden = jax.nn.gelu(linear("up", _normalize(x) * own["scale2"]))
        return x + linear("down", hidden), None

    x, _ = jax.lax.scan(layer, x, (params["layers"], of_layers), unroll=True)
    return _normalize(x) * params["scale"]


def adapted(x: jax.Array, kernel: jax.Array, adapter: Params | None, scale: float) -> jax.Array:
    """Returns `x` times the kernel with its adapter: LoRA's, or DoRA's where it has a magnitude."""
    if adapter is None:
        return x @ kernel
    a, b = adapter["lora_a"], adapter["lora_b"]
    if "lora_magnitude" in adapter:
        return dora_output(x, kernel, adapter["lora_magnitude"], a, b, scale)
    product = (x @ a) @ b
    return x @ kernel + (product if scale == 1 else scale * product)


def _normalize(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
