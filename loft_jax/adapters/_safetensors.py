"""Reads and writes safetensors files and checks what it reads. Nothing is unpickled.

https://huggingface.co/docs/safetensors
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

# In the order of their tensors in a file.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a file, by name; bfloat16 is that of ml_dtypes.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated or damaged, or a tensor is not of one of `DTYPES`.
      ImportError: safetensors is not installed.
    """
    safetensors = import_safetensors()
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

    Only one tensor at a time is copied into the layout of the file, while the functions of the
    package safetensors need all of them, contiguous, in memory. The bytes are the same.

    Args:
      path: the file.
      tensors: by name, with any strides.
      metadata: further entries of the file's metadata.

    Raises:
      ValueError: a value is NaN or infinite, or a tensor is not of one of `DTYPES`.
      ImportError: safetensors is not installed, which reads the file.
    """
    import_safetensors()
    names_of = {dtype: name for name, dtype in DTYPES.items()}
    if odd := [name for name, value in tensors.items() if value.dtype not in names_of]:
        raise ValueError(
            f"{odd[0]} has dtype {tensors[odd[0]].dtype}. Cast it to one of "
            f"{', '.join(map(str, names_of))}"
        )
    # In the order of the package: wide dtypes first, so that every tensor is aligned.
    order = sorted(tensors, key=lambda name: (list(names_of).index(tensors[name].dtype), name))
    # transformers 4 requires the format.
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in order:
        value, start = tensors[name], end
        end += value.nbytes
        entry = {"dtype": names_of[value.dtype], "shape": list(value.shape)}
        header[name] = entry | {"data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            value = np.ascontiguousarray(tensors[name])
            check_finite({name: value}, "the tensors to save")
            file.write(value.reshape(-1).view(np.uint8).data)


def check_finite(tensors: Mapping[str, np.ndarray], where: str) -> None:
    """Checks that no tensor contains a NaN or an infinity.

    Raises:
      ValueError: a tensor does. The message names it.
    """
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise ValueError(f"{where}: {name} contains a NaN or an infinity; training diverged")


def read_tensor(path: Path, name: str) -> np.ndarray:
    """Returns one tensor of a file, without reading the others; bfloat16 is that of ml_dtypes.

    Raises:
      ValueError: the file is damaged, or the tensor is not of one of `DTYPES`.
    """
    safetensors = import_safetensors()
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            kind = file.get_slice(name).get_dtype()
            if kind not in DTYPES:
                raise ValueError(f"{path}: {name} has dtype {kind}. Use one of {', '.join(DTYPES)}")
            return np.asarray(file.get_tensor(name)).view(DTYPES[kind])
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from error


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors of a file, by name, without reading them.

    Raises:
      ValueError: the file is damaged.
    """
    safetensors = import_safetensors()
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            # An open file of safetensors has keys() and is not iterable.
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from error


def import_safetensors() -> ModuleType:
    """Returns the module `safetensors`.

    Raises:
      ImportError: it is not installed. The message names the extra.
    """
    try:
        import safetensors
    except ImportError as error:
        raise ImportError('safetensors is not installed: pip install "loft_jax[peft]"') from error
    return safetensors
