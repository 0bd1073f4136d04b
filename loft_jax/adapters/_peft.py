"""Adapters exchanged with Hugging Face PEFT, without PyTorch or PEFT.

PEFT keeps an adapter in a folder: ``adapter_model.safetensors`` with ``lora_A`` (r, in) and
``lora_B`` (out, r) of each module, and ``adapter_config.json``, which has the scale.
"""

import itertools
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from loft_jax.adapters._families import Family, as_family, each_layer
from loft_jax.adapters._peft_config import TASK_TYPES, make_config, write_config
from loft_jax.adapters._peft_load import CONFIG, PREFIX, WEIGHTS, PeftAdapter, few
from loft_jax.adapters._peft_load import PeftFactors as PeftFactors
from loft_jax.adapters._peft_load import load_peft as load_peft
from loft_jax.adapters._safetensors import replacing, write_tensors
from loft_jax.pairs.axes import FactorLayout
from loft_jax.pairs.find import Pair, PairedTree, find_pairs

# PEFT adds these modules to modules_to_save by the task, and then wants their weights in the file.
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
) -> Path:
    """Writes an adapter for PEFT: `PeftModel.from_pretrained(model, path)` then loads it.

    Args:
      path: the folder; it is made where there is none. The files are written aside and then
        renamed, so that a failed write leaves the old ones whole.
      adapter: a pytree of the factors, as the optimizer has them, of any layout and float dtype.
        Leaves that are no factors, such as a classification head, are saved in full as PEFT's
        modules_to_save: give all parameters of such a module, which PEFT asks for on loading.
      family: the names of the model's modules in transformers: ``llama``, ``gpt2``, ``bert``,
        ``vit``, ``dinov2``, or a `Family`.
      pairs: names, axes and scale of the factors, as in the optimizer. The scale matters here.
      base_model: what PEFT's AutoPeftModel is to load: a hub id or a folder.
      task_type: PEFT's, such as ``CAUSAL_LM`` or ``SEQ_CLS``; it decides PEFT's model class.
      use_rslora: whether the scale is written as ``lora_alpha / sqrt(r)``, not ``lora_alpha / r``.

    Returns:
      The folder.

    Raises:
      ValueError: a path that the family does not know, a stack of layers that the path or the
        axes do not tell, factors on an embedding, a module both adapted and saved in full, a head
        that the task asks for and the adapter lacks, a NaN or an infinity. The message names it.
      ImportError: safetensors is not installed.

    Example:
      >>> import tempfile
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
        raise ValueError(f"task_type {task_type!r}: choose from {', '.join(TASK_TYPES)}, or None")
    tree = find_pairs(adapter, pairs)
    named, others = _names(tree, family)
    tensors, ranks, scales = {}, {}, {}
    for pair, modules in named:
        for module, a, b in zip(modules, *_to_peft(tree, pair, family, modules[0]), strict=True):
            if module in ranks:
                raise ValueError(f"{tree.paths[pair.a]}: a second adapter for {module}")
            tensors[f"{PREFIX}{module}.lora_A.weight"] = a
            tensors[f"{PREFIX}{module}.lora_B.weight"] = b
            ranks[module], scales[module] = pair.r, pair.scale
    saved: set[str] = set()
    for position in others:
        values = family.to_hf(tree.paths[position], np.asarray(tree.leaves[position]))
        for name, value in values.items():
            if PREFIX + name in tensors:
                raise ValueError(f"{tree.paths[position]}: a second parameter for {name}")
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
        write_tensors(temporary / WEIGHTS, tensors)
        write_config(temporary / CONFIG, config)
    return Path(path)


def fill(
    template: Any,
    peft: PeftAdapter,
    *,
    family: Family | str,
    pairs: Any = None,
) -> Any:
    """The tree of an adapter with the values that PEFT has saved.

    Args:
      template: a pytree of the factors (and of modules saved in full), of arrays or of
        `jax.ShapeDtypeStruct`, such as ``nnx.state(model, nnx.LoRAParam)`` of the adapted model.
      peft: from `load_peft`.
      family: as in `save_peft`.
      pairs: names and axes of the factors. A scale that it tells must be the file's. Without
        `pairs` no scale is compared: give the model ``peft.scale_of(module)``.

    Returns:
      The template's tree, its leaves of the template's dtypes, and on its devices where it is
      sharded over a mesh; NumPy arrays where it has them.

    Raises:
      ValueError: modules of the file that the template lacks or the reverse, other shapes, or
        another scale. The message lists all of them.

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
    tree = find_pairs(template, pairs)
    named, others = _names(tree, family)
    wanted = [module for _, modules in named for module in modules]
    for position in others:
        wanted += family.hf_tensors(tree.paths[position], jnp.shape(tree.leaves[position]))
    _compare_names(wanted, (*peft.factors, *peft.saved), peft.path)
    leaves = list(tree.leaves)
    problems: list[str] = []
    for pair, modules in named:
        factors = [peft.factors[module] for module in modules]
        wrong = _misfits(pair, modules, factors, told=pairs is not None)
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


def _names(
    tree: PairedTree, family: Family
) -> tuple[list[tuple[Pair, tuple[str, ...]]], list[int]]:
    """Each pair with its modules in transformers, and the positions of the other leaves."""
    named = []
    for pair in tree.pairs:
        path = _common(tree.paths[pair.a], tree.paths[pair.b])
        named.append((pair, each_layer(family.hf_module(path), pair.batch, tree.paths[pair.a])))
    factors = {position for pair in tree.pairs for position in (pair.a, pair.b)}
    return named, [position for position in range(len(tree.paths)) if position not in factors]


def _common(path_a: str, path_b: str) -> str:
    """The path of the module whose factors lie at these paths."""
    keys = zip(path_a.split("/"), path_b.split("/"), strict=False)
    return "/".join(a for a, _ in itertools.takewhile(lambda both: both[0] == both[1], keys))


def _to_peft(
    tree: PairedTree, pair: Pair, family: Family, module: str
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """lora_A and lora_B of each layer of a pair; `module` is one of them."""
    a, b = jnp.asarray(tree.leaves[pair.a]), jnp.asarray(tree.leaves[pair.b])
    shape = a.shape
    a = np.asarray(pair.layout_a.matricize(a)).reshape(-1, pair.m, pair.r)
    b = np.asarray(pair.layout_b.matricize(b)).reshape(-1, pair.n, pair.r)
    kind = family.kind(module)
    if kind == "embedding":
        raise ValueError(f"{tree.paths[pair.a]}: adapters of an embedding are not supported")
    if kind != "conv2d":
        return list(a.swapaxes(1, 2)), list(b)
    window = [shape[axis] for axis in pair.layout_a.rows]  # height, width, in
    if len(window) != 3:
        raise ValueError(
            f"{tree.paths[pair.a]}: {module} is a convolution, whose a is (height, width, in, r), "
            f"but this one is {shape}"
        )
    return list(a.reshape(-1, *window, pair.r).transpose(0, 4, 3, 1, 2)), list(b[..., None, None])


def _check_saved(saved: Iterable[str], adapted: Iterable[str], task_type: str | None) -> None:
    """Refuses what PEFT would not load."""
    for module, target in itertools.product(saved, adapted):
        # PEFT adapts no module that is, or lies in, one of modules_to_save.
        if f".{module}." in f".{target}.":
            raise ValueError(
                f"{module} is saved in full and {target} is adapted, which PEFT cannot load: train "
                "one of the two, or merge the adapter (save_merged)"
            )
    heads = _HEADS.get(task_type or "", ())
    if heads and not any(module.endswith(heads) for module in saved):
        raise ValueError(
            f"task_type {task_type} makes PEFT look for the trained head ({' or '.join(heads)}) in "
            "the file: put its parameters beside the factors, or leave task_type out"
        )


def _compare_names(wanted: Sequence[str], found: Sequence[str], path: Path) -> None:
    parts = [
        f"the {there} has what the {missing} lacks: {few(names)}"
        for there, missing, names in (
            ("file", "template", [name for name in found if name not in set(wanted)]),
            ("template", "file", [name for name in wanted if name not in set(found)]),
        )
        if names
    ]
    if parts:
        raise ValueError(
            f"{path} and the template differ: {'; '.join(parts)}. The template is the adapter of "
            "the same modules, without the base: nnx.state(model, nnx.LoRAParam), or "
            "loft_jax.adapters.split"
        )


def _misfits(
    pair: Pair, modules: Sequence[str], factors: Sequence[PeftFactors], *, told: bool
) -> list[str]:
    """What keeps these factors of the file from being that pair."""
    wrong = []
    for module, (a, b, scale) in zip(modules, factors, strict=True):
        size = (math.prod(a.shape[:-1]), a.shape[-1], b.shape[1])
        if size != (pair.m, pair.r, pair.n):
            wrong.append(
                f"{module}: in, rank, out are {size}, in the template {(pair.m, pair.r, pair.n)}"
            )
        if told and not math.isclose(scale, pair.scale, rel_tol=1e-6):
            wrong.append(
                f"{module}: the scale is {scale}, LoraPairs has {pair.scale}; give {scale} to it "
                "and to the model"
            )
        elif not math.isclose(scale, factors[0].scale, rel_tol=1e-6):
            wrong.append(
                f"{module}: the scale is {scale}, of {modules[0]} it is {factors[0].scale}; "
                "stacked layers share one: unstack them"
            )
    return wrong


def _like(
    leaf: Any, value: np.ndarray, layout: FactorLayout | None = None, batch: Sequence[int] = ()
) -> Any:
    """The value in the leaf's layout, dtype and place."""
    x = jnp.asarray(value)
    if layout is not None:
        x = layout.unmatricize(x.reshape(*batch, *x.shape[1:]), jnp.shape(leaf))
    if isinstance(leaf, np.ndarray):
        return np.asarray(x).astype(leaf.dtype)
    x = x.astype(leaf.dtype)
    sharding = getattr(leaf, "sharding", None)
    on_mesh = isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh)
    return jax.device_put(x, sharding) if on_mesh else x
