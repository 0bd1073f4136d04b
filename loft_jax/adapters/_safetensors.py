"""Tensors on disk: read with checks, written whole or not at all.

Nothing here unpickles. The format is https://huggingface.co/docs/safetensors.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import ml_dtypes
import numpy as np

from loft_jax.adapters._families import Family, as_family
from loft_jax.pairs.find import path_string
from loft_jax.pairs.names import is_factor

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def save_merged(path: str | os.PathLike[str], weights: Any, *, family: Family | str) -> Path:
    """Writes a whole model's weights, adapters merged, for transformers' `from_pretrained`.

    Puts ``model.safetensors`` into a folder; the ``config.json`` (and the tokenizer) of the base
    model belong beside it. An output head that is tied to the embedding has no tensor of its own.

    Args:
      path: the folder; it is made where there is none. What else it holds stays.
      weights: a pytree of floating-point arrays, as `merge` returns it or
        ``nnx.state(remove_lora(model, merge=True), nnx.Param)``. Kernels are (in, out), of a
        convolution (height, width, in, out), and are transposed as transformers has them;
        embeddings, biases and scales stay. Stacked layers are stacked on axis 0.
      family: the names, as in `save_peft`.

    Returns:
      The folder.

    Raises:
      ValueError: a path that the family does not know, a kernel of another layout, factors of an
        adapter, a NaN or an infinity, or a dtype that is none of float64, float32, float16 and
        bfloat16. The message names the path.
      ImportError: safetensors is not installed.

    Example:
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
    _refuse_factors(tuple(flat))
    tensors: dict[str, np.ndarray] = {}
    for place, leaf in flat.items():
        for name, value in family.to_hf(place, np.asarray(leaf)).items():
            if name in tensors:
                raise ValueError(f"{place}: a second parameter for {name}")
            tensors[name] = value
    with replacing(Path(path)) as temporary:
        write_tensors(temporary / "model.safetensors", tensors)
    return Path(path)


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file, by name; bfloat16 by ml_dtypes.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is truncated or garbled, or holds a dtype that is no common float.
      ImportError: safetensors is not installed.
    """
    safetensors = _import_safetensors()
    try:
        entries = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path}: not a whole safetensors file ({error}); it is truncated or damaged, fetch "
            "or save it again"
        ) from error
    tensors = {}
    for name, entry in entries:
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"{path}: {name} has dtype {entry['dtype']}; adapters are {', '.join(DTYPES)}"
            )
        flat = np.frombuffer(entry["data"], DTYPES[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"])
    check_finite(tensors, str(path))
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors as PyTorch's libraries do.

    Raises:
      ValueError: a NaN, an infinity, or a dtype that is no common float.
      ImportError: safetensors is not installed.
    """
    _import_safetensors()
    from safetensors.numpy import save_file

    if odd := [name for name, value in tensors.items() if value.dtype not in DTYPES.values()]:
        raise ValueError(
            f"{odd[0]} has dtype {tensors[odd[0]].dtype}; cast it to one of "
            f"{', '.join(map(str, DTYPES.values()))}"
        )
    check_finite(tensors, "the tensors to be saved")
    # safetensors writes the memory as it lies, strides or not.
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt"})  # transformers refuses a file without


def check_finite(tensors: Mapping[str, np.ndarray], where: str) -> None:
    """Raises ValueError where a tensor holds a NaN or an infinity."""
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise ValueError(f"{where}: {name} holds a NaN or an infinity; the training diverged")


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder, whose files move into `folder` if and only if all went well."""
    folder.mkdir(parents=True, exist_ok=True)
    # Within the folder, because a rename does not cross file systems.
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
        yield Path(temporary)
        for file in sorted(Path(temporary).iterdir()):
            os.replace(file, folder / file.name)


def _refuse_factors(paths: Sequence[str]) -> None:
    for path in paths:
        if is_factor(path):
            raise ValueError(
                f"{path} is a factor of an adapter: merge the adapters first, with "
                "loft_jax.adapters.merge or remove_lora(model, merge=True)"
            )


def _import_safetensors() -> ModuleType:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            'exchange with PEFT needs safetensors: pip install "loft_jax[peft]"'
        ) from error
    return safetensors
