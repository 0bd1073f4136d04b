"""What an adapter for llama.cpp must know of its base model: architecture, heads, tied head."""

import dataclasses
import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loft_jax.adapters._base_weights import is_tied

# Architectures of llama.cpp by model_type of transformers. Others may store rows in another order.
_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
}
# With interleaved rotary embeddings: llama.cpp permutes the rows of q and k.
_INTERLEAVED = ("llama",)

Base = str | os.PathLike[str] | Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class GgufBase:
    """The base model of an adapter for llama.cpp.

    Attributes:
      architecture: its name in llama.cpp.
      heads, kv_heads: the numbers of attention heads.
      layers: the number of layers.
      tied: whether the output head is the embedding.
      shapes: (out, in) of each matrix by name, if the base is a GGUF file.
    """

    architecture: str
    heads: int
    kv_heads: int
    layers: int
    tied: bool
    shapes: Mapping[str, tuple[int, ...]] | None = None

    def heads_of(self, module: str) -> int | None:
        """Returns the number of heads whose rows llama.cpp permutes, None for other modules.

        Example:
          >>> base = GgufBase("llama", heads=8, kv_heads=2, layers=1, tied=True)
          >>> base.heads_of("model.layers.0.self_attn.k_proj"), base.heads_of("lm_head")
          (2, None)
        """
        if self.architecture not in _INTERLEAVED:
            return None
        heads = {"q_proj": self.heads, "k_proj": self.kv_heads}
        return heads.get(module.rpartition(".")[2])


def read_base(base: Base) -> GgufBase:
    """Reads the base from a GGUF file, a folder of transformers or its configuration.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the architecture is not supported, or a field is missing.
      ImportError: gguf is not installed and the base is a GGUF file.

    Example:
      >>> read_base({"model_type": "mistral", "num_attention_heads": 8, "num_hidden_layers": 2,
      ...            "num_key_value_heads": 2, "tie_word_embeddings": False}).architecture
      'llama'
    """
    if isinstance(base, Mapping):
        return _from_config(base, "base")
    path = Path(base)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing. Pass the GGUF file of the base model, its folder of transformers, "
            "or the contents of its config.json"
        )
    if path.suffix == ".gguf":
        return _from_gguf(path)
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}). Download it again") from error
    return _from_config(config, str(path))


def _from_config(config: Mapping[str, Any], where: str) -> GgufBase:
    kind = config.get("model_type")
    if kind not in _ARCHITECTURES:
        raise ValueError(
            f"{where}: model_type {kind!r} is not supported for GGUF, only "
            f"{', '.join(_ARCHITECTURES)}. Write an adapter for PEFT with fold_scales=True and "
            "convert it with llama.cpp's convert_lora_to_gguf.py"
        )
    names = (
        ("n_head", "n_layer") if kind == "gpt2" else ("num_attention_heads", "num_hidden_layers")
    )
    if missing := [name for name in names if name not in config]:
        raise ValueError(
            f"{where}: {missing[0]} is missing. Pass the whole config.json of the base"
        )
    heads, layers = (int(config[name]) for name in names)
    return GgufBase(
        architecture=_ARCHITECTURES[kind],
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        layers=layers,
        tied=is_tied(config),
    )


def _from_gguf(path: Path) -> GgufBase:
    reader = open_gguf(path)
    field = lambda key: read_field(reader, key)
    architecture = field("general.architecture")
    if architecture not in _ARCHITECTURES.values():
        raise ValueError(
            f"{path}: the architecture {architecture!r} is not supported, only "
            f"{', '.join(sorted(set(_ARCHITECTURES.values())))}"
        )
    heads, layers = (
        field(f"{architecture}.{key}") for key in ("attention.head_count", "block_count")
    )
    kv_heads = field(f"{architecture}.attention.head_count_kv") or heads
    if not all(isinstance(number, int) for number in (heads, kv_heads, layers)):
        raise ValueError(f"{path}: the numbers of heads and layers must be single integers")
    shapes = {tensor.name: tuple(map(int, tensor.shape[::-1])) for tensor in reader.tensors}
    tied = "output.weight" not in shapes
    return GgufBase(architecture, heads, kv_heads, layers, tied, shapes)


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Returns the rows of q or k in llama.cpp's order: both halves of each head interleaved.

    Example:
      >>> permute(np.arange(4), heads=1).tolist()
      [0, 2, 1, 3]
    """
    shape = rows.shape
    return rows.reshape(heads, 2, -1, *shape[1:]).swapaxes(1, 2).reshape(shape)


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `permute`.

    Example:
      >>> unpermute(np.array([0, 2, 1, 3]), heads=1).tolist()
      [0, 1, 2, 3]
    """
    shape = rows.shape
    return rows.reshape(heads, -1, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def open_gguf(path: Path) -> Any:
    """Returns gguf's reader of a file.

    Raises:
      ValueError: the file is damaged.
      ImportError: gguf is not installed.
    """
    gguf = import_gguf()
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # the reader has no exception of its own for damaged files
        raise ValueError(
            f"{path}: not a complete GGUF file ({error}). Write or download it again"
        ) from error


def read_field(reader: Any, key: str) -> Any:
    """Returns the value of a key of a GGUF file, None if it is missing."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def import_gguf() -> Any:
    """Returns the module `gguf`.

    Raises:
      ImportError: it is not installed. The message names the extra.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ImportError('gguf is not installed: pip install "loft_jax[gguf]"') from error
