"""Reads adapters that Hugging Face PEFT has saved, without PyTorch, PEFT or unpickling."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from loft_jax.adapters._base_weights import BaseWeights, Weights
from loft_jax.adapters._initializations import without_initialization
from loft_jax.adapters._loaded import LoadedAdapter, LoraFactors, few, sorted_by_layer
from loft_jax.adapters._patterns import check_cost
from loft_jax.adapters._peft_config import (
    FROM_BASE,
    initialization,
    is_saved_in_full,
    rank_of,
    read_config,
    scale_of,
)
from loft_jax.adapters._peft_parameters import check_experts, parameter_names, stack_from_peft
from loft_jax.adapters._peft_relative import with_adapter_bias, with_token_rows, without_tied
from loft_jax.adapters._safetensors import read_tensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."

# In the tensors of a whole PeftModel the name of the adapter, "default", comes after the role.
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_"
    r"(?:(?P<linear>[AB])(?:\.default)?\.weight|embedding_(?P<embedding>[AB])(?:\.default)?"
    r"|(?P<magnitude>magnitude_vector)(?:\.default)?(?:\.weight)?)"
)
_BASE_LAYER = re.compile(r"(?P<module>.+)\.base_layer\.(?P<parameter>weight|bias)")
_ADAPTER_BIAS = re.compile(r"(?P<module>.+)\.lora_B(?:\.default)?\.bias")
_TOKENS = re.compile(
    r"(?P<module>.+)\.token_adapter\."
    r"(?:trainable_tokens_(?P<role>delta|original)(?:\.default)?|(?P<base>base_layer)\.weight)"
)


def load_peft(path: str | os.PathLike[str], *, base: Weights | None = None) -> LoadedAdapter:
    """Reads an adapter written by PEFT or by `save_peft`. Nothing is unpickled.

    Args:
      path: the folder with adapter_config.json and adapter_model.safetensors.
      base: the weights of the base model: its folder, or a mapping by the names of transformers.
        They are needed for adapters whose initialization changed the base (PiSSA, OLoRA), which are
        converted to adapters of twice the rank for the original base; for trained tokens and for
        biases of adapters (lora_bias), which become whole embeddings and biases in ``saved``; and
        for files that contain weights of the base itself, which must be equal.

    Returns:
      A `LoadedAdapter`. Use `load_into` to put it into a tree. The time and the memory are bounded
      by the sizes of the files, also for files of a stranger. Experts (``target_parameters``) are
      under the names of their parameters, such as ``model.layers.0.mlp.experts.gate_up_proj``.

    Raises:
      FileNotFoundError: one of the files is missing.
      ValueError: a file is damaged, the weights are pickled, the adapter is not LoRA or DoRA on
        linear layers, embeddings, convolutions and experts, a factor has no partner or another rank
        than in the configuration, the base is needed, a tensor is unknown, or a value is NaN or
        infinite. The message names the file and the key and says what to do.
      ImportError: safetensors is not installed.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> from loft_jax.adapters import save_peft
      >>> up = {"lora_a": jnp.ones((6, 3)), "lora_b": jnp.ones((3, 4))}
      >>> adapter = {"h": {"0": {"mlp": {"c_fc": up}}}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     peft = load_peft(save_peft(folder, adapter, family="gpt2"))
      >>> {name: (f.a.shape, f.b.shape) for name, f in peft.factors.items()}
      {'transformer.h.0.mlp.c_fc': ((6, 3), (3, 4))}
    """
    folder = Path(path)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise _missing(folder)
    config = read_config(folder / CONFIG)
    weights_of_base = None if base is None else BaseWeights(base)
    kind = initialization(config)
    if kind in FROM_BASE and weights_of_base is None:
        raise ValueError(
            f"{folder / CONFIG}: init_lora_weights is {kind!r}, which changed the base weights. "
            "Pass base=, the folder of the original base model, to convert the adapter"
        )
    found = _sort(weights, config)
    factors = _all_factors(found.factors, config, weights)
    _check_base(found.of_base, weights_of_base, weights)
    saved = dict(found.saved)
    for module, bias in found.biases.items():
        name, key = f"{module}.bias", f"{PREFIX}{module}.lora_B.bias"
        if module not in factors:
            raise ValueError(f"{weights}: {key} has no factors. Save or download the file again")
        base_bias = saved.get(name, _required(weights_of_base, key, weights).get(name))
        saved[name] = with_adapter_bias(module, bias, factors[module], base_bias, weights)
    for module, parts in without_tied(found.tokens).items():
        name, key = f"{module}.weight", f"{PREFIX}{module}.token_adapter.trainable_tokens_delta"
        if "delta" not in parts:
            raise ValueError(f"{weights}: {key} is missing. Save or download the file again")
        # PEFT writes the embedding too, if it was resized for the training.
        weight = parts.get("base_layer")
        weight = _required(weights_of_base, key, weights)[name] if weight is None else weight
        saved[name] = with_token_rows(module, parts["delta"], config, weight, weights)
    if kind in FROM_BASE:
        assert weights_of_base is not None
        factors = {
            module: without_initialization(module, one, kind, weights_of_base)
            for module, one in factors.items()
        }
    return LoadedAdapter(folder, config, factors, saved)


class _Tensors(NamedTuple):
    """The tensors of a file by what they are, under names without PEFT's prefix.

    Attributes:
      factors: by module and role: "A", "B" or "magnitude".
      saved: parameters that were trained in full.
      of_base: weights of the base that are in the file too.
      biases: of ``lora_B``, by module.
      tokens: "delta", "original" and "base_layer" of embeddings with trained rows, by module.
    """

    factors: dict[str, dict[str, np.ndarray]]
    saved: dict[str, np.ndarray]
    of_base: dict[str, np.ndarray]
    biases: dict[str, np.ndarray]
    tokens: dict[str, dict[str, np.ndarray]]


def _sort(path: Path, config: Mapping[str, Any]) -> _Tensors:
    """Reads the tensors of a file and refuses unknown ones."""
    found = _Tensors({}, {}, {}, {}, {})
    to_save = frozenset(config["modules_to_save"] or ())
    for key, tensor in read_tensors(path).items():
        if not key.startswith(PREFIX):
            raise ValueError(f"{path}: {key}: a key of PEFT must start with {PREFIX}")
        name = key.removeprefix(PREFIX)
        if match := _FACTOR.fullmatch(name):
            role = match["linear"] or match["embedding"] or "magnitude"
            found.factors.setdefault(match["module"], {})[role] = tensor
        elif match := _ADAPTER_BIAS.fullmatch(name):
            found.biases[match["module"]] = tensor
        elif match := _TOKENS.fullmatch(name):
            role = match["role"] or match["base"]
            found.tokens.setdefault(match["module"], {})[role] = tensor
        elif is_saved_in_full(name, to_save):
            found.saved[name] = tensor
        elif match := _BASE_LAYER.fullmatch(name):
            trained = match["parameter"] == "bias" and config["bias"] == "lora_only"
            place = found.saved if trained else found.of_base
            place[f"{match['module']}.{match['parameter']}"] = tensor
        elif name.endswith(".lora_velora_embed") and config["velora_config"]:
            pass  # compresses activations in the training
        elif name.endswith(("embed_tokens.weight", "wte.weight", "lm_head.weight")):
            found.of_base[name] = tensor
        else:
            raise ValueError(
                f"{path}: {key}: neither lora_A nor lora_B, nor part of modules_to_save in {CONFIG}"
            )
    if not found.factors:
        raise ValueError(f"{path}: the file contains no lora_A and lora_B")
    if config["ensure_weight_tying"]:  # then a head that is tied to a trained embedding is written
        for name, value in list(found.of_base.items()):
            if any(np.array_equal(value, other) for other in found.saved.values()):
                del found.of_base[name]
    for field, tensors, key in (
        ("trainable_token_indices", found.tokens, "trainable_tokens_delta"),
        ("lora_bias", found.biases, "lora_B.bias"),
    ):
        if config[field] and not tensors:
            raise ValueError(
                f"{path}: {field} is set in {CONFIG}, and the file has no {key}. The file is "
                "incomplete; save or download it again"
            )
    return found


def _missing(folder: Path) -> Exception:
    """Returns the exception for a folder without weights."""
    if (folder / PICKLE).exists():
        return ValueError(
            f"{folder / PICKLE} is a pickle, which can run any code and is not read. Convert it in "
            "PEFT with save_pretrained(..., safe_serialization=True)"
        )
    # save_pretrained puts an adapter of another name than "default" into a folder of that name.
    inside = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}"))
    where = "a folder that PEFT's save_pretrained has written"
    if inside:
        where = f"one of the folders in it, each of which has an adapter: {few(inside)}"
    return FileNotFoundError(f"{folder / WEIGHTS} is missing. Pass {where}")


def _required(base: BaseWeights | None, key: str, path: Path) -> BaseWeights:
    """Returns the base, which the value of this key is relative to."""
    if base is None:
        raise ValueError(
            f"{path}: {key} is relative to the base model. Pass base=, the folder of the base "
            "model, and the whole parameter is loaded"
        )
    return base


def _check_base(of_base: Mapping[str, np.ndarray], base: BaseWeights | None, path: Path) -> None:
    """Refuses weights of the base in the file, except those that are equal to the base."""
    for name, tensor in of_base.items():
        if base is None:
            raise ValueError(
                f"{path}: {PREFIX}{name} belongs to the base model. PEFT writes embeddings and "
                "heads that are adapted or resized, unless save_pretrained gets "
                "save_embedding_layers=False. Pass base=, the folder of the base model, to compare"
            )
        original = base[name]
        if original.shape != tensor.shape or (original.astype(tensor.dtype) != tensor).any():
            raise ValueError(
                f"{path}: {PREFIX}{name} differs from the base model. Use a base that has this "
                "weight, such as the one that was resized for the training"
            )


def _all_factors(
    tensors: Mapping[str, Mapping[str, np.ndarray]], config: Mapping[str, Any], path: Path
) -> dict[str, LoraFactors]:
    """Returns the factors by the names of modules and, for experts, of parameters."""
    # Ranks and alphas are looked up by the name of the parameter, where one is targeted.
    targeted = parameter_names(tensors, config["target_parameters"] or (), path)
    names = {module: targeted.get(module, module) for module in sorted_by_layer(tensors)}
    patterns = [*(config["rank_pattern"] or ()), *(config["alpha_pattern"] or ())]
    check_cost(patterns, names.values(), path.parent / CONFIG)
    factors: dict[str, LoraFactors] = {}
    for module, parameter in names.items():
        name = parameter.removesuffix(".weight") if module in targeted else module
        if name in factors:
            raise ValueError(f"{path}: two adapters of {name}. Save or download the file again")
        factors[name] = _read_factors(module, parameter, tensors[module], config, path)
    check_experts(factors, path)
    return {module: factors[module] for module in sorted_by_layer(factors)}


def _read_factors(
    module: str,
    parameter: str,
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    path: Path,
) -> LoraFactors:
    """Returns the factors of one module in Flax's layout, checked against the configuration.

    Args:
      module: its name in the file.
      parameter: the name that the patterns refer to: the module's, or that of a parameter.
      tensors: by their roles.
      config: adapter_config.json.
      path: of the file, for messages.
    """
    key = f"{PREFIX}{module}.lora_"
    required = {"A", "B"} | ({"magnitude"} if config["use_dora"] else set())
    if wrong := sorted(required ^ tensors.keys()):
        name = {"magnitude": "magnitude_vector"}.get(wrong[0], f"{wrong[0]}.weight")
        raise ValueError(
            f"{path}: {key}{name} is missing, while the other factor is present, or there is one "
            f"although use_dora in {CONFIG} is {config['use_dora']}. The file is incomplete; save "
            "or download it again"
        )
    a, b, magnitude = tensors["A"], tensors["B"], tensors.get("magnitude")
    rank = rank_of(config, parameter)
    shapes = f"lora_A {a.shape}, lora_B {b.shape}"
    stacked = parameter not in (module, f"{module}.weight")
    if stacked and a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] and a.shape[0] % rank == 0:
        return LoraFactors(*stack_from_peft(a, b, rank), scale_of(config, parameter))
    if a.ndim == b.ndim == 4 and b.shape[2:] == (1, 1):
        if b.shape[1] < rank == a.shape[0]:
            raise ValueError(
                f"{path}: {key}A.weight: {shapes}: an adapter on a grouped convolution, which is "
                "not supported, and which PEFT cannot merge. Serve it with PEFT"
            )
        a, b = a.transpose(2, 3, 1, 0), b[:, :, 0, 0].T
    elif a.ndim == b.ndim == 2:
        a, b = a.T, b.T
    else:
        raise ValueError(
            f"{path}: {key}A.weight: {shapes}. Only linear layers (r, in), (out, r) and "
            "two-dimensional convolutions (r, in, height, width), (out, r, 1, 1) are supported"
        )
    if (a.shape[-1], b.shape[0]) != (rank, rank):
        raise ValueError(
            f"{path}: {key}A.weight: {shapes}, but r and rank_pattern in {CONFIG} give this module "
            f"rank {rank}. The two files do not belong together"
        )
    if magnitude is not None:
        magnitude = magnitude.reshape(-1)  # (out,), or (1, out, 1, 1) for a convolution
        if magnitude.shape != b.shape[1:]:
            raise ValueError(
                f"{path}: {key}magnitude_vector has {magnitude.size} entries, but lora_B has "
                f"{b.shape[1]} outputs. The file is damaged; save or download it again"
            )
    return LoraFactors(a, b, scale_of(config, parameter), magnitude)
