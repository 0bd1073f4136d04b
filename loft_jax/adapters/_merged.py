"""Writes the merged weights of a whole model, as a folder that transformers and mlx-lm load."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from loft_jax.adapters._families import as_family
from loft_jax.adapters._family import Family
from loft_jax.adapters._folder import replacing
from loft_jax.adapters._safetensors import check_finite, write_tensors
from loft_jax.pairs.find import path_string
from loft_jax.pairs.names import is_factor
from loft_jax.pairs.spec import as_pairs

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
# Of a folder of transformers: configuration, tokenizer, preprocessor, chat template and license.
_COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_NOT_COPIED = ("adapter_config.json",)


def save_merged(
    path: str | os.PathLike[str],
    weights: Any,
    *,
    family: Family | str,
    pairs: Any = None,
    base: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Writes the merged weights of a whole model, for `from_pretrained` of transformers and mlx-lm.

    Args:
      path: the folder, which is created if necessary. All files appear together. Weights of a
        former save are removed, other files are kept.
      weights: a pytree of floating-point arrays, as `merge` returns it or
        ``nnx.state(remove_lora(model, merge=True), nnx.Param)``. Kernels must be (in, out), or
        (height, width, in, out) for a convolution; they are transposed to the layout of
        transformers. Embeddings, biases and scales keep theirs. Stacked layers are on axis 0.
      family: the names of the modules, as in `save_peft`.
      pairs: the names of the factors, as in the optimizers. Leaves with such a name are refused.
      base: the folder of the base model, from which configuration, tokenizer and generation files
        are copied. The copied config.json gets the dtype and no quantization, and
        ``tie_word_embeddings`` is set to false if the weights have a head of their own. Without it
        the folder has weights only.
      dtype: ``float32``, ``float16`` or ``bfloat16``; None keeps the dtypes of the weights.
      max_shard_bytes: the size above which the weights are divided into several files with an
        index.

    Returns:
      The folder.

    Raises:
      ValueError: the family has no such module, a kernel has another layout, a leaf is a factor of
        an adapter, a value is NaN, infinite or too large for the dtype, the dtype is not supported,
        or `base` is `path` itself. The message names the path.
      FileNotFoundError: the base has no config.json.
      ImportError: safetensors is not installed.

    Example:
      >>> import tempfile
      >>> weights = {"lm_head": {"kernel": np.ones((4, 6), np.float32)}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = save_merged(folder, weights, family="llama", dtype="bfloat16")
      ...     sorted(file.name for file in Path(folder).iterdir())
      ['model.safetensors']
    """
    family, folder = as_family(family), Path(path)
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}. Use one of {', '.join(_DTYPES)}, or None")
    tensors = _named(weights, family, pairs)
    files = {} if base is None else _files_of(Path(base), folder, tensors, dtype)
    with replacing(folder, stale=("model*.safetensors", INDEX)) as temporary:
        for name, contents in files.items():
            if isinstance(contents, Path):
                shutil.copyfile(contents, temporary / name)  # with the mode of the umask
            else:
                (temporary / name).write_text(contents, encoding="utf-8")
        _write_shards(temporary, tensors, dtype, max_shard_bytes)
    return folder


def _named(weights: Any, family: Family, pairs: Any) -> dict[str, np.ndarray]:
    """Returns the tensors by their names in transformers."""
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
    return tensors


def _write_shards(
    folder: Path, tensors: Mapping[str, np.ndarray], dtype: str | None, limit: int
) -> None:
    """Writes the weights to one file, or to several and an index."""
    width = lambda value: value.itemsize if dtype is None else _DTYPES[dtype].itemsize
    sizes = {name: value.size * width(value) for name, value in tensors.items()}
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if used and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    files = [f"model-{k:05}-of-{len(shards):05}.safetensors" for k in range(1, len(shards) + 1)]
    files = files if len(files) > 1 else [WEIGHTS]
    for file, names in zip(files, shards, strict=True):
        write_tensors(folder / file, {name: _cast(name, tensors[name], dtype) for name in names})
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {
                name: file for file, names in zip(files, shards, strict=True) for name in names
            },
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")


def _cast(name: str, value: np.ndarray, dtype: str | None) -> np.ndarray:
    if dtype is None or value.dtype == _DTYPES[dtype]:
        return value
    check_finite({name: value}, "the tensors to save")
    with np.errstate(over="ignore"):
        cast = value.astype(_DTYPES[dtype])
    if not np.isfinite(cast).all():
        largest = float(np.abs(value).max())
        raise ValueError(f"{name}: {largest:.3g} is too large for {dtype}. Use another dtype")
    return cast


def _files_of(
    base: Path, folder: Path, tensors: Mapping[str, np.ndarray], dtype: str | None
) -> dict[str, Path | str]:
    """Returns the files to write beside the weights: those to copy, and the text of config.json."""
    if not (base / "config.json").is_file():
        raise FileNotFoundError(
            f"{base / 'config.json'} is missing. Pass the folder of the base model, from "
            "save_pretrained or the hub"
        )
    if folder.exists() and base.samefile(folder):
        raise ValueError(f"{folder} is the base model itself. Write the merged model elsewhere")
    files: dict[str, Path | str] = {
        file.name: file
        for file in sorted(base.iterdir())
        if (file.suffix in _COPIED or file.name.startswith("LICENSE"))
        and not file.name.endswith(".index.json")
        and file.name not in _NOT_COPIED
    }
    config = json.loads((base / "config.json").read_bytes())
    config.pop("quantization_config", None)  # the weights are not quantized
    if "lm_head.weight" in tensors and config.get("tie_word_embeddings"):
        config["tie_word_embeddings"] = False
    dtypes = {np.dtype(value.dtype).name for value in tensors.values()}
    written = dtype or (dtypes.pop() if len(dtypes) == 1 else None)
    for key in ("dtype", "torch_dtype"):  # the name in transformers 5, and in 4
        if key in config and written is not None:
            config[key] = written
    files["config.json"] = json.dumps(config, indent=2, sort_keys=True) + "\n"
    return files


def _refuse_factors(paths: Sequence[str], rules: Sequence[tuple[str, str]]) -> None:
    for path in paths:
        if is_factor(path, rules):
            raise ValueError(
                f"{path} is a factor of an adapter. Merge the adapters first, with "
                "loft_jax.adapters.merge or remove_lora(model, merge=True)"
            )
