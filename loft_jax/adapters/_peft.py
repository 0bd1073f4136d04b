"""Exchanges adapters with Hugging Face PEFT, without PyTorch or PEFT.

PEFT stores an adapter as a folder with two files. ``adapter_model.safetensors`` contains ``lora_A``
(r, in) and ``lora_B`` (out, r) of each module, and ``adapter_config.json`` contains the scale.
"""

import dataclasses
import itertools
import math
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from loft_jax.adapters._cast import cast_factors
from loft_jax.adapters._families import as_family
from loft_jax.adapters._family import Family, each_layer
from loft_jax.adapters._peft_config import TASK_TYPES, make_config, write_config
from loft_jax.adapters._peft_load import CONFIG, PREFIX, WEIGHTS, PeftAdapter, few
from loft_jax.adapters._peft_load import PeftFactors as PeftFactors
from loft_jax.adapters._peft_load import load_peft as load_peft
from loft_jax.adapters._safetensors import replacing, write_tensors
from loft_jax.pairs.axes import FactorLayout
from loft_jax.pairs.find import Pair, PairedTree, find_pairs
from loft_jax.pairs.spec import as_pairs

# For these tasks PEFT adds the modules to modules_to_save and then requires their weights.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def save_peft(
    path: str | os.PathLike[str],
    adapter: Any,
    *,
    family: Family | str,
    pairs: Any = None,
    base_model: str | None = None,
    task_type: str | None = None,
    use_rslora: bool = False,
    dtype: jax.typing.DTypeLike | None = None,
) -> Path:
    """Writes an adapter that `PeftModel.from_pretrained(model, path)` of PEFT loads.

    Args:
      path: the folder, which is created if necessary. Both files are written to a temporary folder
        and then renamed, so a failed write leaves the old ones intact.
      adapter: a pytree of the factors, of any layout and float dtype. Other leaves, such as a
        classification head, are saved in full as PEFT's modules_to_save. PEFT requires all
        parameters of such a module.
      family: the names of the model's modules in transformers: ``llama``, ``gpt2``, ``bert``,
        ``vit``, ``dinov2``, or a `Family`.
      pairs: names, axes and scale of the factors, as in the optimizers: a `LoraPairs`, or the
        `LoraRule` with which the model was adapted. The scale is written to the configuration.
      base_model: the hub id or folder of the base model, for AutoPeftModel of PEFT.
      task_type: PEFT's task type, such as ``CAUSAL_LM`` or ``SEQ_CLS``, which selects its model
        class.
      use_rslora: whether to write the scale as ``lora_alpha / sqrt(r)`` instead of
        ``lora_alpha / r``.
      dtype: float32, float16 or bfloat16, to cast the factors with `cast_factors`; None keeps their
        dtypes. The entry ``largest_product_error`` in the metadata of the weights file states the
        largest relative error of a product. Other leaves are not cast.

    Returns:
      The folder.

    Raises:
      ValueError: the family has no such module, the stacked axes are unclear, an embedding is
        adapted, a module is both adapted and saved in full, the head that the task needs is
        missing, a value is NaN or infinite, or a product is too large for float16. The message
        names the path or the module.
      TypeError: another ``dtype``.
      ImportError: safetensors is not installed.

    Example:
      >>> import tempfile
      >>> from loft_jax import LoraPairs
      >>> layer = {"q_proj": {"lora_a": jnp.ones((2, 6, 3)), "lora_b": jnp.ones((2, 3, 4))}}
      >>> adapter = {"layers": {"self_attn": layer}}  # two layers, stacked
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = save_peft(folder, adapter, family="llama", pairs=LoraPairs(scale=2.0))
      ...     peft = load_peft(folder)
      >>> list(peft.factors)
      ['model.layers.0.self_attn.q_proj', 'model.layers.1.self_attn.q_proj']
      >>> peft.config["r"], peft.config["lora_alpha"], peft.scale_of("q_proj")
      (3, 6, 2.0)
    """
    family = as_family(family)
    if task_type is not None and task_type not in TASK_TYPES:
        raise ValueError(
            f"unknown task_type {task_type!r}. Use one of {', '.join(TASK_TYPES)}, or None"
        )
    metadata: dict[str, str] = {}
    if dtype is not None:
        adapter, metadata = _cast(adapter, dtype, pairs)
    tree = _find(adapter, pairs)
    named, others = _names(tree, family)
    tensors, ranks, scales = {}, {}, {}
    for pair, modules in named:
        for module, a, b in zip(modules, *_to_peft(tree, pair, family, modules[0]), strict=True):
            if module in ranks:
                raise ValueError(
                    f"{tree.paths[pair.a]}: another adapter is also written as {module}"
                )
            tensors[f"{PREFIX}{module}.lora_A.weight"] = a
            tensors[f"{PREFIX}{module}.lora_B.weight"] = b
            ranks[module], scales[module] = pair.r, pair.scale
    saved: set[str] = set()
    for position in others:
        values = family.to_hf(tree.paths[position], np.asarray(tree.leaves[position]))
        for name, value in values.items():
            if PREFIX + name in tensors:
                raise ValueError(
                    f"{tree.paths[position]}: another parameter is also written as {name}"
                )
            tensors[PREFIX + name] = value
            saved.add(name.rpartition(".")[0])
    _check_saved(saved, ranks, task_type)
    config = make_config(
        ranks,
        scales,
        use_rslora=use_rslora,
        modules_to_save=sorted(saved) or None,
        fan_in_fan_out=any(family.kind(module) == "conv1d" for module in ranks),
        base_model_name_or_path=base_model,
        task_type=task_type,
    )
    with replacing(Path(path)) as temporary:
        write_tensors(temporary / WEIGHTS, tensors, metadata)
        write_config(temporary / CONFIG, config)
    return Path(path)


def fill(
    template: Any,
    peft: PeftAdapter,
    *,
    family: Family | str,
    pairs: Any = None,
) -> Any:
    """Fills the tree of an adapter with values that PEFT has saved.

    Args:
      template: a pytree of the factors and of modules saved in full, with arrays or
        `jax.ShapeDtypeStruct` as leaves, such as ``nnx.state(model, nnx.LoRAParam)``.
      peft: the result of `load_peft`.
      family: as in `save_peft`.
      pairs: names, axes and scale of the factors, as in `save_peft`. The scale must be the file's.
        With None the scale is not compared; the model needs ``peft.scale_of(module)``.

    Returns:
      The template's tree with the template's dtypes. Leaves are NumPy arrays if the template's
      are, and they are on its mesh if the template is sharded.

    Raises:
      ValueError: the file and the template have different modules, shapes or scales. The message
        lists them.

    Example:
      >>> import tempfile
      >>> up = {"lora_a": jnp.ones((6, 3)), "lora_b": jnp.ones((3, 4))}
      >>> adapter = {"h": {"0": {"mlp": {"c_fc": up}}}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     peft = load_peft(save_peft(folder, adapter, family="gpt2"))
      >>> abstract = jax.eval_shape(lambda: adapter)
      >>> jax.tree.map(jnp.shape, fill(abstract, peft, family="gpt2"))
      {'h': {'0': {'mlp': {'c_fc': {'lora_a': (6, 3), 'lora_b': (3, 4)}}}}}
    """
    family = as_family(family)
    tree = _find(template, pairs)
    named, others = _names(tree, family)
    required = [module for _, modules in named for module in modules]
    for position in others:
        required += family.hf_tensors(tree.paths[position], jnp.shape(tree.leaves[position]))
    _compare_names(required, (*peft.factors, *peft.saved), peft.path)
    leaves = list(tree.leaves)
    problems: list[str] = []
    for pair, modules in named:
        factors = [peft.factors[module] for module in modules]
        wrong = _misfits(pair, modules, factors, compare_scale=pairs is not None)
        problems += wrong
        if not wrong:
            a = np.stack([one.a.reshape(pair.m, pair.r) for one in factors])
            b = np.stack([one.b.T for one in factors])
            leaves[pair.a] = _like(leaves[pair.a], a, pair.layout_a, pair.batch)
            leaves[pair.b] = _like(leaves[pair.b], b, pair.layout_b, pair.batch)
    for position in others:
        leaf = leaves[position]
        try:
            value = family.from_hf(tree.paths[position], jnp.shape(leaf), peft.saved)
        except ValueError as error:
            problems.append(str(error))
        else:
            leaves[position] = _like(leaf, value)
    if problems:
        raise ValueError("\n  ".join([f"{peft.path} does not fit the template:", *problems]))
    return jax.tree.unflatten(tree.treedef, leaves)


def _cast(adapter: Any, dtype: jax.typing.DTypeLike, pairs: Any) -> tuple[Any, dict[str, str]]:
    """Returns the adapter in a dtype, and what the file states about it."""
    cast = cast_factors(adapter, dtype, pairs)
    if lossy := [path for path, error in cast.errors.items() if error > jnp.finfo(dtype).eps]:
        worst = max(lossy, key=lambda path: cast.errors[path])
        warnings.warn(
            f"{jnp.dtype(dtype)} loses {cast.errors[worst]:.2g} of the product of {worst} and its "
            f"partner, {len(lossy)} of {len(cast.errors)} pairs lose more than a cast usually "
            "does. The product may be too small for the dtype: save bfloat16 or float32",
            stacklevel=3,
        )
    return cast.adapter, {"largest_product_error": f"{cast.largest_error:.2g}"}


def _find(adapter: Any, pairs: Any) -> PairedTree:
    # A weight next to its own adapter gets the message of `_check_saved`.
    return find_pairs(adapter, dataclasses.replace(as_pairs(pairs), train_weights=True))


def _names(
    tree: PairedTree, family: Family
) -> tuple[list[tuple[Pair, tuple[str, ...]]], list[int]]:
    """Returns each pair with its modules in transformers, and the positions of other leaves."""
    named = []
    for pair in tree.pairs:
        path = _common(tree.paths[pair.a], tree.paths[pair.b])
        named.append((pair, each_layer(family.hf_module(path), pair.batch, tree.paths[pair.a])))
    return named, tree.others


def _common(path_a: str, path_b: str) -> str:
    """Returns the path of the module, given those of its factors."""
    keys = zip(path_a.split("/"), path_b.split("/"), strict=False)
    return "/".join(a for a, _ in itertools.takewhile(lambda both: both[0] == both[1], keys))


def _to_peft(
    tree: PairedTree, pair: Pair, family: Family, module: str
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns lora_A and lora_B of each layer of a pair; `module` is one of them."""
    a, b = jnp.asarray(tree.leaves[pair.a]), jnp.asarray(tree.leaves[pair.b])
    shape = a.shape
    a = np.asarray(pair.layout_a.matricize(a)).reshape(-1, pair.m, pair.r)
    b = np.asarray(pair.layout_b.matricize(b)).reshape(-1, pair.n, pair.r)
    kind = family.kind(module)
    if kind == "embedding":
        raise ValueError(f"{tree.paths[pair.a]}: adapters on an embedding are not supported")
    if kind != "conv2d":
        return list(a.swapaxes(1, 2)), list(b)
    window = [shape[axis] for axis in pair.layout_a.rows]  # height, width, in
    if len(window) != 3:
        raise ValueError(
            f"{tree.paths[pair.a]}: {module} is a convolution, so a must be (height, width, in, "
            f"r), got {shape}"
        )
    return list(a.reshape(-1, *window, pair.r).transpose(0, 4, 3, 1, 2)), list(b[..., None, None])


def _check_saved(saved: Iterable[str], adapted: Iterable[str], task_type: str | None) -> None:
    """Refuses an adapter that PEFT could not load."""
    for module, target in itertools.product(saved, adapted):
        # PEFT does not adapt modules in modules_to_save, nor their submodules.
        if f".{module}." in f".{target}.":
            raise ValueError(
                f"{module} is saved in full and {target} is adapted, which PEFT cannot load. If "
                "this is the frozen base, save the adapter alone (loft_jax.adapters.split, or "
                "nnx.state(model, nnx.LoRAParam)). If it is trained, merge the adapter and use "
                "save_merged"
            )
    heads = _HEADS.get(task_type or "", ())
    if heads and not any(module.endswith(heads) for module in saved):
        raise ValueError(
            f"with task_type {task_type} PEFT requires the trained head ({' or '.join(heads)}) in "
            "the file. Add its parameters to the adapter, or omit task_type"
        )


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
    pair: Pair, modules: Sequence[str], factors: Sequence[PeftFactors], *, compare_scale: bool
) -> list[str]:
    """Returns the differences between these factors of the file and a pair of the template."""
    wrong = []
    for module, (a, b, scale) in zip(modules, factors, strict=True):
        size = (math.prod(a.shape[:-1]), a.shape[-1], b.shape[1])
        if size != (pair.m, pair.r, pair.n):
            wrong.append(
                f"{module}: (in, rank, out) is {size}, in the template {(pair.m, pair.r, pair.n)}"
            )
        if compare_scale and not math.isclose(scale, pair.scale, rel_tol=1e-6):
            wrong.append(
                f"{module}: the scale is {scale}, pairs= has {pair.scale}. Use {scale} there and "
                "in the model"
            )
        elif not math.isclose(scale, factors[0].scale, rel_tol=1e-6):
            wrong.append(
                f"{module}: the scale is {scale}, that of {modules[0]} is {factors[0].scale}. "
                "Stacked layers must have the same scale; unstack them"
            )
    return wrong


def _like(
    leaf: Any, value: np.ndarray, layout: FactorLayout | None = None, batch: Sequence[int] = ()
) -> Any:
    """Returns the value with the leaf's layout, dtype and sharding."""
    x = jnp.asarray(value)
    if layout is not None:
        x = layout.unmatricize(x.reshape(*batch, *x.shape[1:]), jnp.shape(leaf))
    if isinstance(leaf, np.ndarray):
        return np.asarray(x).astype(leaf.dtype)
    x = x.astype(leaf.dtype)
    sharding = getattr(leaf, "sharding", None)
    on_mesh = isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh)
    return jax.device_put(x, sharding) if on_mesh else x
