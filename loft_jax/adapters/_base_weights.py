"""Reads a base model of transformers: single weights, and whether its head is tied."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loft_jax.adapters._safetensors import import_safetensors, read_tensor

Weights = str | os.PathLike[str] | Mapping[str, np.ndarray]


class BaseWeights:
    """The weights of a base model by name, each read when it is needed.

    Args:
      base: the folder of the model with its ``*.safetensors``, or a mapping.

    Raises:
      FileNotFoundError: the folder has no ``*.safetensors``.
      ImportError: safetensors is not installed and the base is a folder.

    Example:
      >>> BaseWeights({"lm_head.weight": np.ones((4, 6))})["lm_head.weight"].shape
      (4, 6)
    """

    def __init__(self, base: Weights):
        self._arrays = base if isinstance(base, Mapping) else {}
        self._files: dict[str, Path] = {}
        self._where = "base" if isinstance(base, Mapping) else str(base)
        if not isinstance(base, Mapping):
            safetensors = import_safetensors()
            files = sorted(Path(base).glob("*.safetensors"))
            if not files:
                raise FileNotFoundError(
                    f"{base} has no *.safetensors. Pass the folder of the base model, from "
                    "save_pretrained or the hub"
                )
            for file in files:
                with safetensors.safe_open(file, framework="numpy") as opened:
                    self._files |= dict.fromkeys(opened.keys(), file)

    def get(self, name: str) -> np.ndarray | None:
        """Returns a weight, or None if the base does not have it."""
        return self[name] if name in self._arrays or name in self._files else None

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns a weight.

        Raises:
          KeyError: the base has no such weight.
        """
        if name in self._arrays:
            return np.asarray(self._arrays[name])
        if name not in self._files:
            raise KeyError(f"{self._where} has no {name}. Pass the base model of this adapter")
        return read_tensor(self._files[name], name)


def is_tied(config: Mapping[str, Any]) -> bool:
    """Returns whether the output head is the embedding, by a config.json of transformers.

    Example:
      >>> is_tied({"model_type": "gpt2"}), is_tied({"model_type": "llama"})
      (True, False)
    """
    # transformers omits the field where it has the default of the architecture.
    kind = str(config.get("model_type"))
    return bool(config.get("tie_word_embeddings", kind.startswith("gemma") or kind == "gpt2"))
