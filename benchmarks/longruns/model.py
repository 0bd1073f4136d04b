"""A byte-level transformer whose layers are stacked, as pure functions of arrays."""

from typing import Any

import jax
import jax.numpy as jnp

VOCABULARY, HEADS = 256, 4
Params = dict[str, Any]


def init(key: jax.Array, layers: int, width: int, length: int) -> Params:
    """Returns the parameters; the weights that adapters adapt are those named `kernel`."""
    keys = iter(jax.random.split(key, 8))
    normal = lambda *shape: jax.random.normal(next(keys), shape) / shape[-2] ** 0.5
    kernel = lambda m, n: {"kernel": normal(layers, m, n)}
    return {
        "embedding": 0.02 * normal(VOCABULARY, width) * VOCABULARY**0.5,
        "positions": 0.02 * normal(length, width) * length**0.5,
        "layers": {
            "query": kernel(width, width),
            "key": kernel(width, width),
            "value": kernel(width, width),
            "out": kernel(width, width),
            "up": kernel(width, 4 * width),
            "down": kernel(4 * width, width),
            "scale1": jnp.ones((layers, width)),
            "scale2": jnp.ones((layers, width)),
        },
        "scale": jnp.ones(width),
    }


def new_adapters(key: jax.Array, params: Params, rank: int) -> Params:
    """Returns LoRA's factors of all kernels: random `lora_a`, zero `lora_b`."""
    adapters = {}
    for name, entry in params["layers"].items():
        if not isinstance(entry, dict):
            continue
        key, of_a = jax.random.split(key)
        layers, m, n = entry["kernel"].shape
        a = jax.random.normal(of_a, (layers, m, rank)) / m**0.5
        adapters[name] = {"lora_a": a, "lora_b": jnp.zeros((layers, rank, n))}
    return {"layers": adapters}


def loss(params: Params, adapters: Params | None, batch: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats a byte of `batch`, `(n, length + 1)` uint8."""
    inputs, targets = batch[:, :-1].astype(jnp.int32), batch[:, 1:].astype(jnp.int32)
    x = params["embedding"][inputs] + params["positions"][: inputs.shape[1]]
    # One long axis of tokens, and no loop over the layers: on a CPU the gradients then take 0.4 of
    # the time.
    shape, x = x.shape, x.reshape(-1, x.shape[-1])
    of_layers = None if adapters is None else adapters["layers"]

    def layer(x: jax.Array, weights: tuple[Params, Params | None]) -> tuple[jax.Array, None]:
        own, adapter = weights

        def linear(name: str, x: jax.Array) -> jax.Array:
            y = x @ own[name]["kernel"]
            if adapter is None:
                return y
            return y + (x @ adapter[name]["lora_a"]) @ adapter[name]["lora_b"]

        heads = lambda y: y.reshape(*shape[:-1], HEADS, -1)
        normed = _normalize(x) * own["scale1"]
        query, key, value = (heads(linear(name, normed)) for name in ("query", "key", "value"))
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + linear("out", mixed.reshape(x.shape))
        hidden = jax.nn.gelu(linear("up", _normalize(x) * own["scale2"]))
        return x + linear("down", hidden), None

    x, _ = jax.lax.scan(layer, x, (params["layers"], of_layers), unroll=True)
    logits = (_normalize(x) * params["scale"]) @ params["embedding"].T
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets.reshape(-1, 1), axis=-1)
    return -jnp.mean(chosen)


def _normalize(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
