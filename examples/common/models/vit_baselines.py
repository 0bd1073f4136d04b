"""Baselines for Vision Transformers: visual prompts and bottleneck adapters.

Their parameters are `nnx.LoRAParam`, so that they are trained as LoRA's factors are.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from . import vit


class Prompted(nnx.Module):
    """Stacked layers with learned prompts: VPT-deep of Jia et al., 2022.

    Each layer attends to prompts of its own. What it computes at their places is dropped.
    """

    def __init__(self, layer: vit.Layer, config: vit.VitConfig, count: int, *, rngs: nnx.Rngs):
        """Draws `count` prompts for each layer, as the authors do, from a uniform distribution."""
        bound = math.sqrt(6 / (3 * config.patch_size**2 + config.hidden_size))
        shape = (config.num_hidden_layers, count, config.hidden_size)
        self.layer = layer
        self.prompts = nnx.LoRAParam(
            jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(batch, tokens, hidden)` to the same."""
        prompts = self.prompts[...]
        prompts = jnp.broadcast_to(prompts, (len(x), *prompts.shape))
        return self.layer(jnp.concatenate([x, prompts], axis=1))[:, : x.shape[1]]


class Bottleneck(nnx.Module):
    """Stacked parts of layers, each followed by a bottleneck with a residual connection.

    Houlsby et al., 2019, put one behind the attention and one behind the MLP of a layer.
    """

    def __init__(self, part: nnx.Module, layers: int, hidden: int, inner: int, *, rngs: nnx.Rngs):
        """Draws the weights; the output is that of `part` at first."""
        down = 0.01 * jax.random.normal(rngs.params(), (layers, hidden, inner))
        self.part = part
        self.down, self.down_bias = nnx.LoRAParam(down), nnx.LoRAParam(jnp.zeros((layers, inner)))
        self.up = nnx.LoRAParam(jnp.zeros((layers, inner, hidden)))
        self.up_bias = nnx.LoRAParam(jnp.zeros((layers, hidden)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(batch, tokens, hidden)` to the same."""
        x = self.part(x)  # pyright: ignore[reportCallIssue]
        inner = jax.nn.gelu(x @ self.down[...] + self.down_bias[...])
        return x + inner @ self.up[...] + self.up_bias[...]


def add_prompts(model: vit.Vit, count: int, *, rngs: nnx.Rngs) -> vit.Vit:
    """The model with `count` prompts in each layer."""

    def wrap(_: Any, node: Any) -> Any:
        if not isinstance(node, vit.Layer):
            return node
        return Prompted(node, model.config, count, rngs=rngs)

    return nnx.recursive_map(wrap, model)


def add_bottlenecks(model: vit.Vit, inner: int, *, rngs: nnx.Rngs) -> vit.Vit:
    """The model with two bottlenecks of width `inner` in each layer."""
    config = model.config

    def wrap(_: Any, node: Any) -> Any:
        if not isinstance(node, vit.Attention | vit.MLP):
            return node
        return Bottleneck(node, config.num_hidden_layers, config.hidden_size, inner, rngs=rngs)

    return nnx.recursive_map(wrap, model)
