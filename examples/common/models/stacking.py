"""Identical layers stacked into one module, with a leading axis for `jax.lax.scan`."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from loft_jax.adapters import LoraRule

M = TypeVar("M", bound=nnx.Module)

STACKED = (0,)
"""The axis of the parameters on which layers are stacked."""


Keeps = Literal["all", "named", "input"]
_KEPT = "kept"
_POLICIES = {
    "named": jax.checkpoint_policies.save_only_these_names(_KEPT),
    "input": jax.checkpoint_policies.nothing_saveable,
}


def keep(x: jax.Array) -> jax.Array:
    """Marks a result that the backward pass keeps, if `scan_layers` keeps named ones."""
    return checkpoint_name(x, _KEPT)


def stack(make: Callable[[nnx.Rngs], M], count: int, rngs: nnx.Rngs) -> M:
    """One module that holds `count` modules; its parameters have a leading axis of that length."""
    keys = jax.random.split(rngs.params(), count)
    return nnx.vmap(lambda key: make(nnx.Rngs(key)))(keys)


def scan_layers(
    layers: nnx.Module,
    x: jax.Array,
    apply: Callable[..., jax.Array] = lambda layer, x: layer(x),
    *each: jax.Array,
    keeps: Keeps = "all",
) -> jax.Array:
    """Applies the stacked layers to `x`, one after another.

    Args:
        layers: made by `stack`.
        x: the input of the first layer.
        apply: applies one layer to its input.
        *each: arrays whose rows belong to the layers; `apply` gets a row of each.
        keeps: what the backward pass keeps of a layer: all activations, its input and the results
            that the layer passes to `keep`, or its input alone. It computes the rest again.
    """
    graphdef, weights = nnx.split(layers)

    def run(x: jax.Array, of_layer: tuple[Any, ...]) -> tuple[jax.Array, None]:
        weights, *each = of_layer
        return apply(nnx.merge(graphdef, weights), x, *each), None

    step = run if keeps == "all" else jax.checkpoint(run, policy=_POLICIES[keeps])
    return jax.lax.scan(step, x, (weights, *each))[0]


def stacked_rule(
    known: Mapping[str, str],
    targets: Iterable[str],
    rank: int,
    alpha: float,
    layers: str = "layers",
) -> LoraRule:
    """A rule for `loft_jax.adapters.add_lora`: adapters on the named projections of every layer.

    Args:
        known: path within a layer of each projection, by short name.
        targets: short names.
        rank: rank of the adapters.
        alpha: the adapters are scaled by alpha / rank.
        layers: the attribute of the stacked layers.

    Raises:
        ValueError: a target is not in `known`.
    """
    targets = tuple(targets)
    if unknown := [target for target in targets if target not in known]:
        raise ValueError(f"unknown target {unknown[0]!r}: choose from {', '.join(known)}")
    paths = "|".join(dict.fromkeys(known[target] for target in targets))
    return LoraRule(path=f"{layers}/({paths})", rank=rank, alpha=alpha, batch=STACKED)
