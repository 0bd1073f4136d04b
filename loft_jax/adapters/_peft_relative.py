"""Parameters that PEFT stores relative to those of the base: rows of embeddings, and biases.

`load_peft` returns the whole parameter, which needs the base. ``trainable_token_indices`` names the
rows of an embedding that were trained, and the file contains these rows. With ``lora_bias`` the
factor ``lora_B`` has a bias, so that a layer adds ``scale * bias`` to its own.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loft_jax.adapters._loaded import LoraFactors


def check_token_indices(value: Any, path: Path) -> None:
    """Refuses a ``trainable_token_indices`` that is not a list of ids, or lists by module.

    Raises:
      ValueError: it is something else, or an id is negative or occurs twice.

    Example:
      >>> check_token_indices({"embed_tokens": [5, 7]}, Path("adapter_config.json"))
    """
    lists = list(value.values()) if isinstance(value, dict) else [value]
    for ids in lists:
        whole = isinstance(ids, list) and all(type(k) is int and k >= 0 for k in ids)
        if not whole or len(set(ids)) < len(ids):
            raise ValueError(
                f"{path}: trainable_token_indices must be a list of different token ids, or an "
                f"object of such lists by module, got {str(value)[:80]}"
            )


def with_token_rows(
    module: str, rows: np.ndarray, config: Mapping[str, Any], weight: np.ndarray, path: Path
) -> np.ndarray:
    """Returns an embedding whose trained rows are replaced.

    Args:
      module: its name in transformers.
      rows: (tokens, dim), the trained rows.
      config: adapter_config.json, which has the ids of the tokens.
      weight: (vocabulary, dim), the embedding of the base. It is not changed.
      path: of the file, for the message.

    Raises:
      ValueError: the configuration has no ids for this module, or the shapes do not fit.

    Example:
      >>> config = {"trainable_token_indices": [2, 0]}
      >>> rows = np.array([[5.0], [6.0]])
      >>> with_token_rows("wte", rows, config, np.zeros((3, 1)), Path("file")).ravel().tolist()
      [6.0, 0.0, 5.0]
    """
    ids = _token_ids(module, config["trainable_token_indices"])
    fits = rows.ndim == 2 and rows.shape == (len(ids), *weight.shape[1:])
    if not ids or not fits or max(ids) >= len(weight):
        raise ValueError(
            f"{path}: {module} has trained rows {rows.shape}, while trainable_token_indices names "
            f"{len(ids)} tokens up to {max(ids, default=-1)} and the embedding of the base is "
            f"{weight.shape}. Pass the base model of this adapter, resized as it was for the "
            "training"
        )
    trained = weight.copy()
    trained[ids] = rows.astype(weight.dtype)
    return trained


def _token_ids(module: str, indices: Any) -> Sequence[int]:
    if not isinstance(indices, dict):
        return indices or ()
    # As PEFT finds modules: by the end of the name.
    keys = module.split(".")
    ends = (".".join(keys[start:]) for start in range(len(keys)))
    return next((indices[end] for end in ends if end in indices), ())


def without_tied(
    tokens: Mapping[str, Mapping[str, np.ndarray]],
) -> dict[str, Mapping[str, np.ndarray]]:
    """Leaves out heads that are tied to the embedding, which PEFT writes if it was resized.

    Args:
      tokens: by module, the trained rows ("delta") and perhaps the whole weight ("base_layer").

    Example:
      >>> parts = {"delta": np.ones((1, 2)), "base_layer": np.ones((3, 2))}
      >>> list(without_tied({"lm_head": parts, "model.embed_tokens": dict(parts)}))
      ['model.embed_tokens']
    """
    kept: dict[str, Mapping[str, np.ndarray]] = {}
    for module in sorted(tokens, key=lambda module: module.endswith("lm_head")):  # heads last
        parts = tokens[module]
        same = lambda other, parts=parts: all(
            part in other and np.array_equal(other[part], value) for part, value in parts.items()
        )
        if "base_layer" not in parts or not any(map(same, kept.values())):
            kept[module] = parts
    return kept


def with_adapter_bias(
    module: str, bias: np.ndarray, one: LoraFactors, own: np.ndarray | None, path: Path
) -> np.ndarray:
    """Returns the bias of a layer with that of its adapter.

    Args:
      module: its name in transformers.
      bias: (out,), the bias of ``lora_B``.
      one: the factors, for the scale.
      own: (out,), the bias of the layer; None if it has none.
      path: of the file, for the message.

    Raises:
      ValueError: the layer has no bias, or one of another shape.

    Example:
      >>> one = LoraFactors(np.ones((6, 3)), np.ones((3, 2)), scale=2.0)
      >>> own = np.array([1.0, 0.0])
      >>> with_adapter_bias("up", np.array([0.5, 0.5]), one, own, Path("file")).tolist()
      [2.0, 1.0]
    """
    if own is None:
        raise ValueError(
            f"{path}: {module} has a bias in its adapter (lora_bias), and the layer has none to "
            "add it to, nor could PEFT merge it. Serve it with PEFT"
        )
    if own.shape != bias.shape:
        raise ValueError(
            f"{path}: the adapter of {module} has a bias {bias.shape}, the base has {own.shape}. "
            "Pass the base model of this adapter"
        )
    return (own.astype(np.float64) + one.scale * bias.astype(np.float64)).astype(own.dtype)
