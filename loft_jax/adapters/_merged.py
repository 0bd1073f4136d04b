"""Writes the merged weights of a whole model for transformers."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from loft_jax.adapters._families import as_family
from loft_jax.adapters._family import Family
from loft_jax.adapters._folder import replacing
from loft_jax.adapters._safetensors import read_tensors as read_tensors
from loft_jax.adapters._safetensors import write_tensors
from loft_jax.pairs.find import path_string
from loft_jax.pairs.names import is_factor
from loft_jax.pairs.spec import as_pairs


def save_merged(
    path: str | os.PathLike[str], weights: Any, *, family: Family | str, pairs: Any = None
) -> Path:
    """Writes the merged weights of a whole model, for `from_pretrained` of transformers.

    It writes ``model.safetensors``. Copy the ``config.json`` and the tokenizer of the base model
    into the same folder. An output head tied to the embedding has no tensor of its own.

    Args:
      path: the folder, which is created if necessary. Other files in it are kept.
      weights: a pytree of floating-point arrays, as `merge` returns it or
        ``nnx.state(remove_lora(model, merge=True), nnx.Param)``. Kernels must be (in, out), or
        (height, width, in, out) for a convolution; they are transposed to the layout of
        transformers. Embeddings, biases and scales keep theirs. Stacked layers are on axis 0.
      family: the names of the modules, as in `save_peft`.
      pairs: the names of the factors, as in the optimizers. Leaves with such a name are refused.

    Returns:
      The folder.

    Raises:
      ValueError: the family has no such module, a kernel has another layout, a leaf is a factor of
        an adapter, or a value is NaN, infinite or of a dtype other than float64, float32, float16
        and bfloat16. The message names the path.
      ImportError: safetensors is not installed.

    Example:
      >>> import tempfile
      >>> weights = {"lm_head": {"kernel": np.ones((4, 6), np.float32)}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = save_merged(folder, weights, family="llama") / "model.safetensors"
      ...     {name: tensor.shape for name, tensor in read_tensors(file).items()}
      {'lm_head.weight': (6, 4)}
    """
    family = as_family(family)
    flat = {
        path_string(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(weights)[0]
    }
    _refuse_factors(tuple(flat), as_pairs(pairs).rules)
    tensors: dict[str, np.ndarray] = {}
    for name, leaf in flat.items():
        for hf_name, value in family.to_hf(name, np.asarray(leaf)).items():
            if hf_name in tensors:
                raise ValueError(f"{name}: another parameter is also written as {hf_name}")
            tensors[hf_name] = value
    with replacing(Path(path)) as temporary:
        write_tensors(temporary / "model.safetensors", tensors)
    return Path(path)


def _refuse_factors(paths: Sequence[str], rules: Sequence[tuple[str, str]]) -> None:
    for path in paths:
        if is_factor(path, rules):
            raise ValueError(
                f"{path} is a factor of an adapter. Merge the adapters first, with "
                "loft_jax.adapters.merge or remove_lora(model, merge=True)"
            )
