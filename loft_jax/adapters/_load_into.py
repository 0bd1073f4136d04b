"""Puts a loaded adapter into the tree of a model."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from loft_jax.adapters._collect import find_named_pairs, modules_of
from loft_jax.adapters._families import as_family
from loft_jax.adapters._family import Family
from loft_jax.adapters._loaded import LoadedAdapter, LoraFactors, few
from loft_jax.pairs.axes import FactorLayout
from loft_jax.pairs.find import Pair


def load_into(
    template: Any,
    loaded: LoadedAdapter,
    *,
    family: Family | str,
    pairs: Any = None,
) -> Any:
    """Returns the template with the values of a loaded adapter.

    Args:
      template: a pytree of the factors and of modules saved in full, with arrays or
        `jax.ShapeDtypeStruct` as leaves, such as ``nnx.state(model, nnx.LoRAParam)``.
      loaded: the result of `load_peft`, `load_gguf` or `load_mlx`.
      family: the names of the modules, as in `save_peft`.
      pairs: names, axes and scale of the factors, as in `save_peft`. The scale must be the file's.
        With None the scale is not compared; the model needs ``loaded.scale_of(module)``.

    Returns:
      The template's tree with the template's dtypes. Leaves are NumPy arrays if the template's
      are, and they are on its mesh if the template is sharded.

    Raises:
      ValueError: the file and the template have different modules, shapes or scales. The message
        lists them.

    Example:
      >>> import tempfile
      >>> from loft_jax.adapters import load_peft, save_peft
      >>> up = {"lora_a": jnp.ones((6, 3)), "lora_b": jnp.ones((3, 4))}
      >>> adapter = {"h": {"0": {"mlp": {"c_fc": up}}}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     loaded = load_peft(save_peft(folder, adapter, family="gpt2"))
      >>> abstract = jax.eval_shape(lambda: adapter)
      >>> jax.tree.map(jnp.shape, load_into(abstract, loaded, family="gpt2"))
      {'h': {'0': {'mlp': {'c_fc': {'lora_a': (6, 3), 'lora_b': (3, 4)}}}}}
    """
    family = as_family(family)
    tree = find_named_pairs(template, pairs)
    named = [(pair, modules_of(tree, pair, family)) for pair in tree.pairs]
    required = [module for _, modules in named for module in modules]
    for position in tree.others:
        required += family.hf_tensors(tree.paths[position], jnp.shape(tree.leaves[position]))
    _compare_names(required, (*loaded.factors, *loaded.saved), loaded.path)
    leaves = list(tree.leaves)
    problems: list[str] = []
    for pair, modules in named:
        factors = [loaded.factors[module] for module in modules]
        wrong = _misfits(pair, modules, factors, compare_scale=pairs is not None)
        problems += wrong
        if not wrong:
            a = np.stack([one.a.reshape(pair.m, pair.r) for one in factors])
            b = np.stack([one.b.T for one in factors])
            leaves[pair.a] = _like(leaves[pair.a], a, pair.layout_a, pair.batch)
            leaves[pair.b] = _like(leaves[pair.b], b, pair.layout_b, pair.batch)
    for position in tree.others:
        leaf = leaves[position]
        try:
            value = family.from_hf(tree.paths[position], jnp.shape(leaf), loaded.saved)
        except ValueError as error:
            problems.append(str(error))
        else:
            leaves[position] = _like(leaf, value)
    if problems:
        raise ValueError("\n  ".join([f"{loaded.path} does not fit the template:", *problems]))
    return jax.tree.unflatten(tree.treedef, leaves)


def _compare_names(required: Sequence[str], found: Sequence[str], path: Path) -> None:
    parts = [
        f"only the {one} has {few(names)}"
        for one, names in (
            ("file", [name for name in found if name not in set(required)]),
            ("template", [name for name in required if name not in set(found)]),
        )
        if names
    ]
    if parts:
        raise ValueError(
            f"{path} and the template differ: {'; '.join(parts)}. The template must be the adapter "
            "of the same modules without the base, from nnx.state(model, nnx.LoRAParam) or "
            "loft_jax.adapters.split"
        )


def _misfits(
    pair: Pair, modules: Sequence[str], factors: Sequence[LoraFactors], *, compare_scale: bool
) -> list[str]:
    """Returns the differences between these factors of the file and a pair of the template."""
    wrong = []
    for module, one in zip(modules, factors, strict=True):
        size = (math.prod(one.a.shape[:-1]), one.rank, one.b.shape[1])
        if size != (pair.m, pair.r, pair.n):
            wrong.append(
                f"{module}: (in, rank, out) is {size}, in the template {(pair.m, pair.r, pair.n)}"
            )
        if compare_scale and not math.isclose(one.scale, pair.scale, rel_tol=1e-6):
            wrong.append(
                f"{module}: the scale is {one.scale}, pairs= has {pair.scale}. Use {one.scale} "
                "there and in the model"
            )
        elif not math.isclose(one.scale, factors[0].scale, rel_tol=1e-6):
            wrong.append(
                f"{module}: the scale is {one.scale}, that of {modules[0]} is {factors[0].scale}. "
                "Stacked layers must have the same scale; unstack them"
            )
    return wrong


def _like(
    leaf: Any, value: np.ndarray, layout: FactorLayout | None = None, batch: Sequence[int] = ()
) -> Any:
    """Returns the value with the leaf's layout, dtype and sharding."""
    if layout is not None:
        value = _unmatricize(value.reshape(*batch, *value.shape[1:]), layout, jnp.shape(leaf))
    value = value.astype(leaf.dtype)
    if isinstance(leaf, np.ndarray):
        return value
    sharding = getattr(leaf, "sharding", None)
    on_mesh = isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh)
    return jax.device_put(value, sharding) if on_mesh else jnp.asarray(value)


def _unmatricize(x: np.ndarray, layout: FactorLayout, shape: Sequence[int]) -> np.ndarray:
    """Returns ``(*batch, rows, rank)`` in the layout of a leaf of that shape, on the host."""
    order = (*layout.batch, *layout.rows, layout.rank)
    return x.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))
