"""Adapters for the benchmarks of cost: shapes of real models, random values."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from loft_jax import LoraAxes, LoraPairs


class PairSet(NamedTuple):
    """The adapted weights of a model.

    Attributes:
      layers: the number of layers.
      shapes: ``(inputs, outputs)`` of each adapted weight of a layer.
    """

    layers: int
    shapes: Mapping[str, tuple[int, int]]

    @property
    def pairs(self) -> int:
        """The number of adapted weights."""
        return self.layers * len(self.shapes)

    @property
    def entries(self) -> int:
        """The number of entries of all adapted weights: the sum of ``m n``."""
        return self.layers * sum(m * n for m, n in self.shapes.values())

    @property
    def rows(self) -> int:
        """The number of rows of all factors: the sum of ``m + n``."""
        return self.layers * sum(m + n for m, n in self.shapes.values())


def _projections(hidden: int, keys: int, inner: int) -> dict[str, tuple[int, int]]:
    """The weights that the paper adapts in LLaMA-7B: Q, K, V, Up and Down."""
    return {
        "q": (hidden, hidden),
        "k": (hidden, keys),
        "v": (hidden, keys),
        "up": (hidden, inner),
        "down": (inner, hidden),
    }


SMOLLM2 = _projections(576, 192, 1536)
LLAMA = _projections(4096, 4096, 11008)

PAIR_SETS = {
    # All linear layers of GPT-2's blocks except the first of the MLP.
    "gpt2": PairSet(12, {"qkv": (768, 2304), "out": (768, 768), "down": (3072, 768)}),
    "smollm2": PairSet(30, SMOLLM2),
    "llama-7b": PairSet(32, LLAMA),
    # One of the 32 layers: on a CPU all of them take minutes per step.
    "llama-7b-layer": PairSet(1, LLAMA),
}

STACKED = LoraPairs(axes=LoraAxes(batch=(0,)))
"""The pairs of layers that are stacked on a first axis."""


def adapters(pair_set: PairSet, rank: int, stacked: bool = False) -> dict[str, Any]:
    """Factors as training leaves them, neither of them zero.

    Layers are separate arrays, or stacked on a first axis as in models with scanned layers.
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


def like(params: Any) -> Any:
    """Gradients for factors: other values of about their size."""
    return jax.tree.map(lambda x: jnp.roll(x, 1, axis=-1) / 10 + 0.01, params)
