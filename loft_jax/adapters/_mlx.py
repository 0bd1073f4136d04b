"""Exchanges adapters with mlx-lm, which serves models on Apple silicon, without MLX.

mlx-lm stores an adapter as a folder with two files. ``adapters.safetensors`` contains ``lora_a``
(in, r), ``lora_b`` (r, out) and for DoRA ``m`` (out,) of each module. ``adapter_config.json``
contains one rank and one scale for all modules.

https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/LORA.md
"""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from loft_jax.adapters._cast_modules import cast_modules
from loft_jax.adapters._collect import collect
from loft_jax.adapters._families import as_family
from loft_jax.adapters._family import Family
from loft_jax.adapters._folder import replacing
from loft_jax.adapters._loaded import (
    LoadedAdapter,
    LoraFactors,
    few,
    refuse_experts,
    sorted_by_layer,
)
from loft_jax.adapters._safetensors import read_tensors, write_tensors
from loft_jax.adapters._scales import fold_scales, most_common, pad_ranks

CONFIG = "adapter_config.json"
WEIGHTS = "adapters.safetensors"

_BLOCK = re.compile(r"model\.(?:layers|h)\.\d+\.(.+)")


def save_mlx(
    path: str | os.PathLike[str],
    adapter: Any,
    *,
    family: Family | str,
    pairs: Any = None,
    base_model: str | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> Path:
    """Writes an adapter that mlx-lm loads: ``mlx_lm.generate --adapter-path``.

    Args:
      path: the folder, which is created if necessary. Both files appear together.
      adapter: a pytree of the factors, of any layout and float dtype.
      family: the names of the modules, as in `save_peft`.
      pairs: names, axes and scale of the factors, as in `save_peft`. Scales that differ are
        multiplied into ``lora_b``, and ranks that differ are padded with zeros.
      base_model: the hub id or folder of the base model, for the reader of the configuration.
      dtype: float32, float16 or bfloat16, to cast the factors as in `cast_factors`; None keeps
        their dtypes.

    Returns:
      The folder.

    Raises:
      ValueError: a module is neither in a block of a language model nor its output head, a
        parameter is saved in full, or a product is too large for float16. The message names the
        module.
      TypeError: another `dtype`.
      ImportError: safetensors is not installed.

    Example:
      >>> import tempfile
      >>> up = {"lora_a": np.ones((6, 3)), "lora_b": np.ones((3, 4))}
      >>> adapter = {"layers": {"0": {"mlp": {"up_proj": up}}}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     loaded = load_mlx(save_mlx(folder, adapter, family="llama"), family="llama")
      >>> loaded.config["lora_parameters"]["keys"], loaded.scale_of("up_proj")
      (['mlp.up_proj'], 1.0)
    """
    family = as_family(family)
    factors, saved = collect(adapter, family, pairs)
    refuse_experts(factors, "mlx-lm")
    if saved:
        raise ValueError(
            f"mlx-lm cannot load parameters saved in full ({few(saved)}) beside an adapter. Merge "
            "the adapter and use save_merged, or omit them"
        )
    scale = most_common(one.scale for one in factors.values())
    factors, metadata = cast_modules(fold_scales(factors, scale), dtype)
    factors = pad_ranks(factors)
    dora = {one.magnitude is not None for one in factors.values()}
    if len(dora) > 1:
        raise ValueError(
            "some adapters have a magnitude (DoRA) and some do not, and mlx-lm has one kind for "
            "all. Train all with DoRA, or none"
        )
    tensors, keys = {}, set()
    for module, one in factors.items():
        name = _mlx_name(module, family)
        keys.add(match[1] if (match := _BLOCK.fullmatch(name)) else name)
        tensors |= {f"{name}.lora_a": one.a, f"{name}.lora_b": one.b}
        if one.magnitude is not None:
            tensors[f"{name}.m"] = one.magnitude
    rank = next(iter(factors.values())).rank
    config = {
        "fine_tune_type": "dora" if dora == {True} else "lora",
        "lora_parameters": {"dropout": 0.0, "keys": sorted(keys), "rank": rank, "scale": scale},
        "model": base_model,
        # All layers. A layer without an adapter keeps mlx-lm's own, whose product is zero.
        "num_layers": -1,
    }
    with replacing(Path(path)) as temporary:
        write_tensors(temporary / WEIGHTS, tensors, metadata)
        text = json.dumps(config, indent=4, sort_keys=True)
        (temporary / CONFIG).write_text(text, encoding="utf-8")
    return Path(path)


def load_mlx(path: str | os.PathLike[str], *, family: Family | str) -> LoadedAdapter:
    """Reads an adapter that mlx-lm or `save_mlx` has written.

    Args:
      path: the folder with adapter_config.json and adapters.safetensors.
      family: the names of the modules, as in `save_peft`.

    Returns:
      A `LoadedAdapter`. Use `load_into` to put it into a tree.

    Raises:
      FileNotFoundError: one of the files is missing.
      ValueError: a file is damaged, the weights are fine-tuned in full, a factor has no partner or
        another rank than in the configuration, or a tensor is unknown. The message names the file
        and the key.
      ImportError: safetensors is not installed.

    Example:
      >>> import tempfile
      >>> q = {"lora_a": np.ones((1, 6, 3)), "lora_b": np.ones((1, 3, 4))}  # one layer, stacked
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = save_mlx(folder, {"layers": {"self_attn": {"q_proj": q}}}, family="llama")
      ...     loaded = load_mlx(folder, family="llama")
      >>> list(loaded.factors)
      ['model.layers.0.self_attn.q_proj']
    """
    family, folder = as_family(family), Path(path)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing. Pass a folder that mlx-lm reads")
    config, weights = _read_config(folder / CONFIG), folder / WEIGHTS
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in read_tensors(weights).items():
        name, _, role = key.rpartition(".")
        if role not in ("lora_a", "lora_b", "m"):
            raise ValueError(f"{weights}: {key}: neither lora_a, lora_b nor m")
        found.setdefault(_hf_name(name, family), {})[role] = tensor
    if not found:
        raise ValueError(f"{weights}: the file contains no lora_a and lora_b")
    factors = {
        name: _factors(name, found[name], config, weights) for name in sorted_by_layer(found)
    }
    return LoadedAdapter(folder, config, factors, {})


def _mlx_name(module: str, family: Family) -> str:
    """Returns the path of a module in mlx-lm, whose backbone is always called ``model``."""
    prefix = family.prefix and family.prefix + "."
    name = f"model.{module.removeprefix(prefix)}" if module.startswith(prefix) else module
    if name != "lm_head" and not _BLOCK.fullmatch(name):
        raise ValueError(
            f"{module}: only the blocks of a language model and lm_head can be adapted for mlx-lm. "
            "An embedding may be tied to the head there. Leave it out, or use save_merged"
        )
    return name


def _hf_name(name: str, family: Family) -> str:
    """The inverse of `_mlx_name`."""
    prefix = family.prefix and family.prefix + "."
    return prefix + name.removeprefix("model.") if name.startswith("model.") else name


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}). Save or download it again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(config).__name__}")
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise ValueError(
            f"{path}: fine_tune_type is {kind!r}; only lora and dora are adapters. Convert full "
            "weights with mlx_lm.fuse"
        )
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise ValueError(f"{path}: lora_parameters must be an object, got {parameters!r}")
    rank, scale = parameters.get("rank"), parameters.get("scale")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"{path}: rank must be an integer of at least 1, got {rank!r}")
    if not isinstance(scale, int | float) or not math.isfinite(scale) or scale == 0:
        raise ValueError(f"{path}: scale must be a finite number other than zero, got {scale!r}")
    return config


def _factors(
    module: str, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], path: Path
) -> LoraFactors:
    required = {"lora_a", "lora_b"} | ({"m"} if config.get("fine_tune_type") == "dora" else set())
    if wrong := required ^ tensors.keys():
        raise ValueError(
            f"{path}: {module}: {', '.join(sorted(wrong))} is missing or does not belong to "
            f"fine_tune_type {config.get('fine_tune_type', 'lora')}"
        )
    a, b, parameters = tensors["lora_a"], tensors["lora_b"], config["lora_parameters"]
    rank = parameters["rank"]
    if a.ndim != 2 or b.ndim != 2 or (a.shape[1], b.shape[0]) != (rank, rank):
        raise ValueError(
            f"{path}: {module}: lora_a {a.shape}, lora_b {b.shape}, but {CONFIG} has rank {rank}. "
            "Only linear layers (in, r), (r, out) are supported"
        )
    return LoraFactors(a, b, float(parameters["scale"]), tensors.get("m"))
