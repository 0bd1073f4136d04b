"""Reads adapters that Hugging Face PEFT has saved, without PyTorch, PEFT or unpickling."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loft_jax.adapters._loaded import LoadedAdapter, LoraFactors, sorted_by_layer
from loft_jax.adapters._peft_config import is_saved_in_full, rank_of, read_config, scale_of
from loft_jax.adapters._safetensors import read_tensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."

_FACTOR = re.compile(r"(.+)\.lora_(?:([AB])\.weight|embedding_([AB]))")

_UNSUPPORTED_KEYS = (
    ("lora_magnitude_vector", "DoRA is not supported; merge it in PEFT instead"),
    ("lora_B.bias", "a bias in the adapter (lora_bias) is not supported"),
    (
        "embed",
        "neither a factor nor part of modules_to_save. PEFT's save_pretrained writes embeddings "
        "unless it gets save_embedding_layers=False",
    ),
)


def load_peft(path: str | os.PathLike[str]) -> LoadedAdapter:
    """Reads an adapter written by PEFT or by `save_peft`. Nothing is unpickled.

    Args:
      path: the folder with adapter_config.json and adapter_model.safetensors.

    Returns:
      A `LoadedAdapter`. Use `load_into` to put it into a tree.

    Raises:
      FileNotFoundError: one of the files is missing.
      ValueError: a file is damaged, the weights are pickled, the adapter is not plain LoRA on
        linear layers and convolutions, a factor has no partner or another rank than in the
        configuration, a tensor is unknown, or a value is NaN or infinite. The message names the
        file and the key and says what to do.
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
        if (folder / PICKLE).exists():
            raise ValueError(
                f"{folder / PICKLE} is a pickle, which can run any code and is not read. Convert "
                "it in PEFT with save_pretrained(..., safe_serialization=True)"
            )
        raise FileNotFoundError(
            f"{weights} is missing. Pass a folder that PEFT's save_pretrained has written"
        )
    config = read_config(folder / CONFIG)
    tensors: dict[str, dict[str, np.ndarray]] = {}
    saved: dict[str, np.ndarray] = {}
    for key, tensor in read_tensors(weights).items():
        if not key.startswith(PREFIX):
            raise ValueError(f"{weights}: {key}: a key of PEFT must start with {PREFIX}")
        name = key.removeprefix(PREFIX)
        if match := _FACTOR.fullmatch(name):
            tensors.setdefault(match[1], {})[match[2] or match[3]] = tensor
        elif is_saved_in_full(name, config["modules_to_save"] or ()):
            saved[name] = tensor
        else:
            raise ValueError(f"{weights}: {key}: {_why_unknown(key)}")
    if not tensors:
        raise ValueError(f"{weights}: the file contains no lora_A and lora_B")
    factors = {
        module: _read_factors(module, tensors[module], config, weights)
        for module in sorted_by_layer(tensors)
    }
    return LoadedAdapter(folder, config, factors, saved)


def _read_factors(
    module: str, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], path: Path
) -> LoraFactors:
    """Returns the factors of one module in Flax's layout, checked against the configuration."""
    key = f"{PREFIX}{module}.lora_"
    if missing := {"A", "B"} - tensors.keys():
        raise ValueError(
            f"{path}: {key}{missing.pop()}.weight is missing, while the other factor is present. "
            "The file is incomplete; save or download it again"
        )
    a, b = tensors["A"], tensors["B"]
    shapes = f"lora_A {a.shape}, lora_B {b.shape}"
    if a.ndim == b.ndim == 4 and b.shape[2:] == (1, 1):
        a, b = a.transpose(2, 3, 1, 0), b[:, :, 0, 0].T
    elif a.ndim == b.ndim == 2:
        a, b = a.T, b.T
    else:
        raise ValueError(
            f"{path}: {key}A.weight: {shapes}. Only linear layers (r, in), (out, r) and "
            "two-dimensional convolutions (r, in, height, width), (out, r, 1, 1) are supported"
        )
    rank = rank_of(config, module)
    if (a.shape[-1], b.shape[0]) != (rank, rank):
        raise ValueError(
            f"{path}: {key}A.weight: {shapes}, but r and rank_pattern in {CONFIG} give this module "
            f"rank {rank}. The two files do not belong together"
        )
    return LoraFactors(a, b, scale_of(config, module))


def _why_unknown(key: str) -> str:
    why = (reason for part, reason in _UNSUPPORTED_KEYS if part in key)
    return next(why, f"neither lora_A nor lora_B, nor part of modules_to_save in {CONFIG}")
