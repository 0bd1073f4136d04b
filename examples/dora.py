"""DoRA's layers, in the place of those of `add_lora`: with a magnitude for each output."""

from typing import Any

import jax
from flax import nnx

from loft_jax.adapters import LoraLayer
from loft_jax.baselines import dora_init, dora_output


class DoraLayer(nnx.Module):
    """A linear layer whose weight is a direction, which LoRA adapts, times a magnitude."""

    def __init__(self, layer: LoraLayer):
        """Takes over base and factors; `layer` adapts an `nnx.Linear`, stacked on axis 0 or not."""
        self.base, self.scale = layer.base, layer.scale
        self.lora_a, self.lora_b = layer.lora_a, layer.lora_b
        init = jax.vmap(dora_init) if layer.stack else dora_init
        self.lora_magnitude = nnx.LoRAParam(init(layer.base.kernel[...]))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(..., in)` to `(..., out)`."""
        factors = (self.lora_magnitude[...], self.lora_a[...], self.lora_b[...])
        y = dora_output(x, self.base.kernel[...], *factors, self.scale)
        return y if self.base.bias is None else y + self.base.bias[...]


def add_dora(model: Any) -> Any:
    """The model with a `DoraLayer` in the place of each `LoraLayer`."""
    wrap = lambda path, node: DoraLayer(node) if isinstance(node, LoraLayer) else node
    return nnx.recursive_map(wrap, model)
