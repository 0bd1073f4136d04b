"""The adapters that the benchmarks of cost run on: real models' shapes, random values."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from loft_jax import LoraAxes, LoraPairs


class PairSet(NamedTuple):
    """The adapted weights of a model.

    Attributes:
      layers: how many layers it has.
      shapes: ``(inputs, outputs)`` of each adapted weight of a layer.
    """

    layers: int
    shapes: Mapping[str, tuple[int, int]]

    @property
    def pairs(self) -> int:
        return self.layers * len(self.shapes)

    @property
    def entries(self) -> int:
        """Numbers of all adapted weights, the sum of their ``m n``."""
        return self.layers * sum(m * n for m, n in self.shapes.values())

    @property
    def rows(self) -> int:
        """Rows of all factors, the sum of ``m + n``."""
        return self.layers * sum(m + n for m, n in self.shapes.values())


SMOLLM2 = {
    "q": (576, 576),
    "k": (576, 192),
    "v": (576, 192),
    "up": (576, 1536),
    "down": (1536, 576),
}
LLAMA = {
    "q": (4096, 4096),
    "k": (4096, 4096),
    "v": (4096, 4096),
    "up": (4096, 11008),
    "down": (11008, 4096),
}

PAIR_SETS = {
    # All linear layers of GPT-2's blocks but the MLP's first.
    "gpt2": PairSet(12, {"qkv": (768, 2304), "out": (768, 768), "down": (3072, 768)}),
    # Q, K, V, Up and Down, as the paper adapts LLaMA-7B.
    "smollm2": PairSet(30, SMOLLM2),
    "llama-7b": PairSet(32, LLAMA),
    # One of the 32 layers: on a CPU all of them take minutes a step.
    "llama-7b-layer": PairSet(1, LLAMA),
    # All seven projections.
    "llama-7b-all": PairSet(32, LLAMA | {"o": (4096, 4096), "gate": (4096, 11008)}),
}


STACKED = LoraPairs(axes=LoraAxes(batch=(0,)))
"""How the optimizer is told of stacked layers."""


def adapters(pair_set: PairSet, rank: int, stacked: bool = False) -> dict[str, Any]:
    """Factors as training leaves them: neither is zero.

    Layers are apart, or stacked on a first axis as models with scanned layers have them.
    """

    def factors(seed: int, m: int, n: int) -> dict[str, jax.Array]:
        key_a, key_b = jax.random.split(jax.random.key(seed))
        return {
            "lora_a": jax.random.normal(key_a, (m, rank)) / m**0.5,
            "lora_b": jax.random.normal(key_b, (rank, n)) / 100,
        }

    layers = [
        {name: factors(i, *shape) for name, shape in pair_set.shapes.items()}
        for i in range(pair_set.layers)
    ]
    if stacked:
        return jax.tree.map(lambda *x: jnp.stack(x), *layers)
    return {f"layer_{i}": layer for i, layer in enumerate(layers)}


def abstract_adapters(pair_set: PairSet, rank: int) -> dict[str, Any]:
    """Their shapes and dtypes alone."""
    return jax.eval_shape(lambda: adapters(pair_set, rank))


def like(params: Any) -> Any:
    """Gradients for factors: other values of about their size."""
    return jax.tree.map(lambda x: jnp.roll(x, 1, axis=-1) / 10 + 0.01, params)
