"""Reads a tree of factors as an adapter under the names of transformers, for every exporter."""

import dataclasses
import itertools
from typing import Any

import numpy as np

from loft_jax.adapters._family import Family, each_layer
from loft_jax.adapters._loaded import LoraFactors
from loft_jax.pairs.axes import FactorLayout
from loft_jax.pairs.find import Pair, PairedTree, adapted_weights, find_pairs, listing
from loft_jax.pairs.init_checks import check_as_made
from loft_jax.pairs.spec import as_pairs

MAGNITUDE = "lora_magnitude"
"""The name of DoRA's magnitude, beside ``lora_a``."""


def collect(
    adapter: Any, family: Family, pairs: Any = None
) -> tuple[dict[str, LoraFactors], dict[str, np.ndarray]]:
    """Returns the factors and the parameters saved in full, by their names in transformers.

    Args:
      adapter: a pytree of the factors, of DoRA's magnitudes (``lora_magnitude`` beside ``lora_a``)
        and of parameters that are saved in full.
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
    check_as_made(tree, pairs, "The exporter", "the products differ", stacklevel=4)
    factors: dict[str, LoraFactors] = {}
    magnitudes = magnitude_positions(tree)
    for pair in tree.pairs:
        modules = modules_of(tree, pair, family)
        found = _factors(tree, pair, family, modules[0])
        if (position := magnitudes.get(pair.a)) is not None:
            if found[0].is_stack:
                raise ValueError(
                    f"{tree.paths[position]}: PEFT has no DoRA for experts, and the other formats "
                    "have no experts. Merge the adapter into the weights"
                )
            values = np.asarray(tree.leaves[position]).reshape(len(found), -1)
            check_magnitude(tree, pair, position)
            found = [one._replace(magnitude=m) for one, m in zip(found, values, strict=True)]
        for module, one in zip(modules, found, strict=True):
            if module in factors:
                raise ValueError(
                    f"{tree.paths[pair.a]}: another adapter is also written as {module}"
                )
            factors[module] = one
    saved: dict[str, np.ndarray] = {}
    for position in tree.others:
        if position in magnitudes.values():
            continue
        values = family.to_hf(tree.paths[position], np.asarray(tree.leaves[position]))
        for name, value in values.items():
            if name in saved:
                raise ValueError(
                    f"{tree.paths[position]}: another parameter is also written as {name}"
                )
            saved[name] = value
    return factors, saved


def find_named_pairs(adapter: Any, pairs: Any) -> PairedTree:
    """Finds the pairs of an adapter that is written to a file or read from one.

    Raises:
      ValueError: as `find_pairs`; the tree has the frozen weights too, as a whole model has.
    """
    tree = find_pairs(adapter, dataclasses.replace(as_pairs(pairs), train_weights=True))
    if weights := adapted_weights(tree):
        headline = (
            "These weights lie next to their own adapters, and a file holds only one of the two. "
            "Pass the adapter alone: nnx.state(model, nnx.LoRAParam) of an nnx model, or the first "
            "result of loft_jax.adapters.split, with a trained head beside it. If the weights are "
            "trained too, merge the adapter and use save_merged:"
        )
        raise ValueError(listing(headline, weights))
    return tree


def modules_of(tree: PairedTree, pair: Pair, family: Family) -> tuple[str, ...]:
    """Returns the modules in transformers that a pair adapts, one for each stacked layer.

    Raises:
      ValueError: the family has no such module, or the stacked axes are unclear. The message names
        the path.
    """
    keys = zip(tree.paths[pair.a].split("/"), tree.paths[pair.b].split("/"), strict=False)
    path = "/".join(a for a, _ in itertools.takewhile(lambda both: both[0] == both[1], keys))
    module, stack = family.hf_module(path), pair.batch
    if family.kind(module) == "experts":
        if not stack:
            raise ValueError(
                f"{tree.paths[pair.a]}: {module} is a stack of experts, so the factors need an "
                "axis of experts, after that of the layers. Specify it with "
                "LoraPairs(axes=LoraAxes(batch=...))"
            )
        stack = stack[:-1]  # the last one enumerates the experts
    return each_layer(module, stack, tree.paths[pair.a])


def magnitude_positions(tree: PairedTree) -> dict[int, int]:
    """Returns the positions of DoRA's magnitudes, by those of the factors ``a`` beside them."""
    position = {path: k for k, path in enumerate(tree.paths)}
    beside = lambda pair: tree.paths[pair.a].rpartition("/")[0] + "/" + MAGNITUDE
    found = {pair.a: position.get(beside(pair).lstrip("/")) for pair in tree.pairs}
    return {a: k for a, k in found.items() if k is not None}


def check_magnitude(tree: PairedTree, pair: Pair, position: int) -> None:
    """Refuses a magnitude that is not one number for each output.

    Raises:
      ValueError: it has another shape. The message names the path.
    """
    shape, required = np.shape(tree.leaves[position]), (*pair.batch, pair.n)
    if shape != required:
        raise ValueError(
            f"{tree.paths[position]}: the magnitude has the shape {shape}, and must be {required}, "
            "the stacked axes and the outputs"
        )


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
    experts = [pair.batch[-1]] if family.kind(module) == "experts" else []
    a = _matricize(a, pair.layout_a).reshape(-1, *experts, *(window or [pair.m]), pair.r)
    b = _matricize(b, pair.layout_b).reshape(-1, *experts, pair.n, pair.r).swapaxes(-1, -2)
    return [LoraFactors(one, other, pair.scale) for one, other in zip(a, b, strict=True)]


def _matricize(x: np.ndarray, layout: FactorLayout) -> np.ndarray:
    """Returns ``(*batch, rows, rank)`` on the host. JAX would round float64 to float32."""
    x = x.transpose(*layout.batch, *layout.rows, layout.rank)
    return x.reshape(*x.shape[: len(layout.batch)], -1, x.shape[-1])
