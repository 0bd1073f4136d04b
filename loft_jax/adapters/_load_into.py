"""Puts a loaded adapter into the tree of a model."""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from loft_jax.adapters._collect import (
    check_magnitude,
    find_named_pairs,
    magnitude_positions,
    modules_of,
)
from loft_jax.adapters._families import FAMILIES, as_family
from loft_jax.adapters._family import Family
from loft_jax.adapters._loaded import LoadedAdapter, LoraFactors, few
from loft_jax.pairs.axes import FactorLayout
from loft_jax.pairs.declared import declared_scale
from loft_jax.pairs.find import Pair, PairedTree, listing
from loft_jax.pairs.init_checks import check_batch_axes


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
      pairs: names, axes and scale of the factors, as in `save_peft`. The scale must be the file's,
        which is ``loaded.scale_of(module)``. With None it is compared with that of adapters which
        `add_lora`, `LoraModel` or qwix made in this process, and a difference is warned of.

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
    check_batch_axes(tree, pairs)
    named = [(pair, modules_of(tree, pair, family)) for pair in tree.pairs]
    _compare_names(tree, family, loaded)
    magnitudes = magnitude_positions(tree)
    leaves = list(tree.leaves)
    problems: list[str] = []
    for pair, modules in named:
        factors = [loaded.factors[module] for module in modules]
        wrong = _misfits(pair, modules, factors, compare_scale=pairs is not None)
        position = magnitudes.get(pair.a)
        wrong += _without_partner(modules, factors, in_template=position is not None)
        if loaded.config.get("target_parameters") and family.kind(modules[0]) == "conv1d":
            wrong.append(
                f"{modules[0]}: target_parameters of a layer that stores (in, out) are not "
                "supported. Adapt it by target_modules, or merge it in PEFT (merge_and_unload)"
            )
        problems += wrong
        if position is not None and not wrong:
            check_magnitude(tree, pair, position)
            values = np.stack([np.asarray(one.magnitude) for one in factors])
            shape = jnp.shape(leaves[position])
            leaves[position] = _like(leaves[position], values.reshape(shape))
        if not wrong:
            # One pair of matrices for each layer, or for each layer and expert.
            a = np.concatenate([one.matrices()[0] for one in factors])
            b = np.concatenate([one.matrices()[1].swapaxes(1, 2) for one in factors])
            leaves[pair.a] = _like(leaves[pair.a], a, pair.layout_a, pair.batch)
            leaves[pair.b] = _like(leaves[pair.b], b, pair.layout_b, pair.batch)
    for position in tree.others:
        if position in magnitudes.values():
            continue
        leaf = leaves[position]
        try:
            value = family.from_hf(tree.paths[position], jnp.shape(leaf), loaded.saved)
        except ValueError as error:
            problems.append(str(error))
        else:
            leaves[position] = _like(leaf, value)
    if problems:
        raise ValueError("\n  ".join([f"{loaded.path} does not fit the template:", *problems]))
    if pairs is None:
        _warn_of_scales(tree, named, loaded)
    return jax.tree.unflatten(tree.treedef, leaves)


def _compare_names(tree: PairedTree, family: Family, loaded: LoadedAdapter) -> None:
    """Refuses a template with other modules than the file."""
    found = (*loaded.factors, *loaded.saved)
    required = _required(tree, family)
    parts = [
        f"only the {one} has {few(names)}"
        for one, names in (
            ("file", [name for name in found if name not in set(required)]),
            ("template", [name for name in required if name not in set(found)]),
        )
        if names
    ]
    if not parts:
        return
    remedy = (
        "The template must be the adapter of the same modules without the base, from "
        "nnx.state(model, nnx.LoRAParam) or loft_jax.adapters.split"
    )
    # The names of another version of transformers, or of a model without its head.
    for other in FAMILIES.values():
        for prefix in (other.prefix, ""):
            if _fits(tree, dataclasses.replace(other, prefix=prefix), found):
                remedy = f"The names in the file are those of family={other.name!r}"
                if not prefix:
                    remedy = (
                        f"The names in the file are those of a model without its head: "
                        f'family=dataclasses.replace(FAMILIES[{other.name!r}], prefix="")'
                    )
                raise ValueError(f"{loaded.path} and the template differ: {remedy}")
    raise ValueError(f"{loaded.path} and the template differ: {'; '.join(parts)}. {remedy}")


def _required(tree: PairedTree, family: Family) -> list[str]:
    """Returns the modules and parameters of a template by their names in transformers."""
    required = [module for pair in tree.pairs for module in modules_of(tree, pair, family)]
    magnitudes = magnitude_positions(tree).values()
    for position in tree.others:
        if position not in magnitudes:
            required += family.hf_tensors(tree.paths[position], jnp.shape(tree.leaves[position]))
    return required


def _fits(tree: PairedTree, family: Family, found: Sequence[str]) -> bool:
    try:
        return sorted(_required(tree, family)) == sorted(found)
    except ValueError:  # the family has no such module
        return False


def _without_partner(
    modules: Sequence[str], factors: Sequence[LoraFactors], *, in_template: bool
) -> list[str]:
    """Returns the modules that have a magnitude (DoRA) either in the file or in the template."""
    return [
        f"{module}: only the {'template' if in_template else 'file'} has a magnitude (DoRA)"
        for module, one in zip(modules, factors, strict=True)
        if (one.magnitude is not None) != in_template
    ]


def _misfits(
    pair: Pair, modules: Sequence[str], factors: Sequence[LoraFactors], *, compare_scale: bool
) -> list[str]:
    """Returns the differences between these factors of the file and a pair of the template."""
    wrong = []
    experts = math.prod(pair.batch) // len(modules)
    for module, one in zip(modules, factors, strict=True):
        a, b = one.matrices()
        size, wanted = (a.shape[1], one.rank, b.shape[2]), (pair.m, pair.r, pair.n)
        axes = "(in, rank, out)"
        if one.is_stack:
            axes, size, wanted = "(experts, in, rank, out)", (len(a), *size), (experts, *wanted)
        if size != wanted:
            wrong.append(f"{module}: {axes} is {size}, in the template {wanted}")
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


def _warn_of_scales(
    tree: PairedTree, named: Sequence[tuple[Pair, tuple[str, ...]]], loaded: LoadedAdapter
) -> None:
    """Warns of adapters that were made with another scale than the file's."""
    wrong = []
    for pair, modules in named:
        made, of_file = declared_scale(tree.paths[pair.a]), loaded.factors[modules[0]].scale
        if made is not None and not math.isclose(made, of_file, rel_tol=1e-6):
            wrong.append(
                f"{tree.paths[pair.a]}: made with scale {made:g}, the file has {of_file:g}"
            )
    if wrong:
        headline = (
            f"The model multiplies these adapters by another scale than {loaded.path}, so that it "
            "computes something else. Make the model's with alpha = rank * loaded.scale_of(module):"
        )
        warnings.warn(listing(headline, wrong), stacklevel=3)


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
