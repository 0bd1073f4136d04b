"""Reads and writes files of tensors: reading checks them, writing is all or nothing.

Nothing is unpickled. The format is https://huggingface.co/docs/safetensors.
"""

import contextlib
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import ml_dtypes
import numpy as np

from loft_jax.adapters._families import as_family
from loft_jax.adapters._family import Family
from loft_jax.pairs.find import path_string
from loft_jax.pairs.names import is_factor
from loft_jax.pairs.spec import as_pairs

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


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


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a file, by name; bfloat16 is that of ml_dtypes.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated or damaged, or a tensor is not of one of `DTYPES`.
      ImportError: safetensors is not installed.
    """
    safetensors = _import_safetensors()
    try:
        entries = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path}: not a complete safetensors file ({error}). It is truncated or damaged; "
            "download or save it again"
        ) from error
    tensors = {}
    for name, entry in entries:
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"{path}: {name} has dtype {entry['dtype']}, which must be one of "
                f"{', '.join(DTYPES)}"
            )
        flat = np.frombuffer(entry["data"], DTYPES[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"])
    check_finite(tensors, str(path))
    return tensors


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors in the form that PyTorch's libraries read, with the modes of the umask.

    Args:
      path: the file.
      tensors: by name.
      metadata: more entries for the header of the file.

    Raises:
      ValueError: a value is NaN or infinite, or a tensor is not of one of `DTYPES`.
      ImportError: safetensors is not installed.
    """
    _import_safetensors()
    from safetensors.numpy import save_file

    if odd := [name for name, value in tensors.items() if value.dtype not in DTYPES.values()]:
        raise ValueError(
            f"{odd[0]} has dtype {tensors[odd[0]].dtype}. Cast it to one of "
            f"{', '.join(map(str, DTYPES.values()))}"
        )
    check_finite(tensors, "the tensors to save")
    # safetensors writes the memory of an array and ignores its strides.
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    header = {"format": "pt", **(metadata or {})}  # transformers requires the first entry
    save_file(contiguous, path, metadata=header)
    path.chmod(mode)  # safetensors gives its files mode 600


def check_finite(tensors: Mapping[str, np.ndarray], where: str) -> None:
    """Checks that no tensor contains a NaN or an infinity.

    Raises:
      ValueError: a tensor does. The message names it.
    """
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise ValueError(f"{where}: {name} contains a NaN or an infinity; training diverged")


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files appear in `folder` together, if there was no exception.

    A new folder appears by one rename. In an existing folder the old files of the same names move
    out before the new ones move in, and move back if that fails. So at no time is an old file next
    to a new one.
    """
    exists = folder.exists()
    parent = folder if exists else folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    temporary = parent / f".saving-{uuid.uuid4().hex}"  # on the same file system
    temporary.mkdir()  # with the mode of the umask, unlike tempfile.mkdtemp
    try:
        yield temporary
        if exists:
            _replace_files(temporary, folder)
        else:
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace_files(new: Path, folder: Path) -> None:
    names = sorted(file.name for file in new.iterdir())
    old = new / "old"
    old.mkdir()
    try:
        for name in names:
            if (folder / name).exists():
                os.replace(folder / name, old / name)
        for name in names:
            os.replace(new / name, folder / name)
    except BaseException:
        for file in old.iterdir():
            file.rename(folder / file.name)
        raise


def _refuse_factors(paths: Sequence[str], rules: Sequence[tuple[str, str]]) -> None:
    for path in paths:
        if is_factor(path, rules):
            raise ValueError(
                f"{path} is a factor of an adapter. Merge the adapters first, with "
                "loft_jax.adapters.merge or remove_lora(model, merge=True)"
            )


def _import_safetensors() -> ModuleType:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError('safetensors is not installed: pip install "loft_jax[peft]"') from error
    return safetensors
