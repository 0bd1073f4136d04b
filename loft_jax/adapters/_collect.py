"""Reads a tree of factors as an adapter under the names of transformers, for every exporter."""

import dataclasses
import itertools
from typing import Any

import numpy as np

from loft_jax.adapters._family import Family, each_layer
from loft_jax.adapters._loaded import LoraFactors
from loft_jax.pairs.axes import FactorLayout
from loft_jax.pairs.find import Pair, PairedTree, find_pairs
from loft_jax.pairs.spec import as_pairs


def collect(
    adapter: Any, family: Family, pairs: Any = None
) -> tuple[dict[str, LoraFactors], dict[str, np.ndarray]]:
    """Returns the factors and the parameters saved in full, by their names in transformers.

    Args:
      adapter: a pytree of the factors and of parameters that are saved in full.
      family: the names of the modules.
      pairs: names, axes and scale of the factors, as in the optimizers.

    Returns:
      `LoraFactors` by module, and tensors in the layout of transformers by name. The arrays are on
      the host and keep their dtypes.

    Raises:
      ValueError: the family has no such module, the stacked axes are unclear, or two leaves have
        the same name in transformers. The message names the path.

    Example:
      >>> from loft_jax.adapters import FAMILIES
      >>> up = {"lora_a": np.ones((6, 3)), "lora_b": np.ones((3, 4))}
      >>> factors, saved = collect({"h": {"0": {"mlp": {"c_fc": up}}}}, FAMILIES["gpt2"])
      >>> list(factors), saved
      (['transformer.h.0.mlp.c_fc'], {})
    """
    tree = find_named_pairs(adapter, pairs)
    factors: dict[str, LoraFactors] = {}
    for pair in tree.pairs:
        modules = modules_of(tree, pair, family)
        for module, one in zip(modules, _factors(tree, pair, family, modules[0]), strict=True):
            if module in factors:
                raise ValueError(
                    f"{tree.paths[pair.a]}: another adapter is also written as {module}"
                )
            factors[module] = one
    saved: dict[str, np.ndarray] = {}
    for position in tree.others:
        values = family.to_hf(tree.paths[position], np.asarray(tree.leaves[position]))
        for name, value in values.items():
            if name in saved:
                raise ValueError(
                    f"{tree.paths[position]}: another parameter is also written as {name}"
                )
            saved[name] = value
    return factors, saved


def find_named_pairs(adapter: Any, pairs: Any) -> PairedTree:
    """Finds the pairs of a tree that may also contain the weights next to them."""
    # A weight next to its own adapter gets the message of the exporter.
    return find_pairs(adapter, dataclasses.replace(as_pairs(pairs), train_weights=True))


def modules_of(tree: PairedTree, pair: Pair, family: Family) -> tuple[str, ...]:
    """Returns the modules in transformers that a pair adapts, one for each stacked layer."""
    keys = zip(tree.paths[pair.a].split("/"), tree.paths[pair.b].split("/"), strict=False)
    path = "/".join(a for a, _ in itertools.takewhile(lambda both: both[0] == both[1], keys))
    return each_layer(family.hf_module(path), pair.batch, tree.paths[pair.a])


def _factors(tree: PairedTree, pair: Pair, family: Family, module: str) -> list[LoraFactors]:
    """Returns the factors of each layer of a pair; `module` is one of them."""
    a, b = (np.asarray(tree.leaves[position]) for position in (pair.a, pair.b))
    window: list[int] = []
    if family.kind(module) == "conv2d":
        window = [a.shape[axis] for axis in pair.layout_a.rows]  # height, width, in
        if len(window) != 3:
            raise ValueError(
                f"{tree.paths[pair.a]}: {module} is a convolution, so a must be (height, width, "
                f"in, r), got {a.shape}"
            )
    a = _matricize(a, pair.layout_a).reshape(-1, *(window or [pair.m]), pair.r)
    b = _matricize(b, pair.layout_b).reshape(-1, pair.n, pair.r).swapaxes(1, 2)
    return [LoraFactors(one, other, pair.scale) for one, other in zip(a, b, strict=True)]


def _matricize(x: np.ndarray, layout: FactorLayout) -> np.ndarray:
    """Returns ``(*batch, rows, rank)`` on the host. JAX would round float64 to float32."""
    x = x.transpose(*layout.batch, *layout.rows, layout.rank)
    return x.reshape(*x.shape[: len(layout.batch)], -1, x.shape[-1])
