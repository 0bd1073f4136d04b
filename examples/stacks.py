"""Layers stacked into one: their parameters have a leading axis, and a scan runs over it."""

from collections.abc import Callable
from typing import TypeVar

import jax
from flax import nnx

M = TypeVar("M", bound=nnx.Module)

STACKED = (0,)
"""The axis of the layers' parameters on which the layers are stacked."""


def stack(make: Callable[[nnx.Rngs], M], count: int, rngs: nnx.Rngs) -> M:
    """`count` modules as one, whose parameters have a leading axis of that length."""
    keys = jax.random.split(rngs.params(), count)
    return nnx.vmap(lambda key: make(nnx.Rngs(key)))(keys)


def scan_layers(layers: nnx.Module, x: jax.Array) -> jax.Array:
    """`x` through each of the stacked layers, one after another."""
    graphdef, weights = nnx.split(layers)

    def run(x: jax.Array, weights: nnx.State) -> tuple[jax.Array, None]:
        return nnx.merge(graphdef, weights)(x), None

    return jax.lax.scan(run, x, weights)[0]
