"""Pretrained weights: folders in Hugging Face's format, and filling a model with tensors."""

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from loft_jax.adapters import Family

from ..errors import UserError
from ..meshes import put

M = TypeVar("M", bound=nnx.Module)

LAYER = "{layer}"
"""What a family writes in a module's name for the number of a stacked layer."""


def find_folder(source: str, contents: str) -> Path:
    """A local folder, or the local copy of a Hugging Face hub repository.

    Args:
        source: the user's `--model`: a folder, or a hub id (owner/name).
        contents: the files that such a folder contains, for the error message.
    """
    if Path(source).is_dir():
        return Path(source)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return _from_hub(source)
    raise UserError(
        f"--model {source}: there is no such folder, and it is not a hub id (owner/name). Pass a "
        f"folder with {contents}."
    )


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file that contains an object."""
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}: pass a folder from save_pretrained.")
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot use {path}: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"Cannot use {path}: it does not contain a JSON object.")
    return content


class Safetensors(Mapping[str, np.ndarray]):
    """The tensors of a folder, from one file or from shards; each is read when it is asked for."""

    def __init__(self, folder: Path):
        """Reads the names of the tensors.

        Raises:
            UserError: there are no such files, or one is missing or truncated.
        """
        from safetensors import SafetensorError, safe_open

        self._open = safe_open
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(read_json(index)["weight_map"].values()))
        else:
            names = sorted(path.name for path in folder.glob("*.safetensors"))
        if not names:
            raise UserError(
                f"{folder} has no *.safetensors file (PyTorch's .bin is not supported)."
            )
        self._files: dict[str, Path] = {}
        for name in names:
            try:
                with safe_open(folder / name, "np") as file:
                    self._files |= dict.fromkeys(file.keys(), folder / name)
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"Cannot read {folder / name} ({error}): it is missing or truncated; fetch it "
                    "again."
                ) from error

    def __getitem__(self, name: str) -> np.ndarray:
        # The file is closed again, so that its pages do not stay in memory.
        with self._open(self._files[name], "np") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


Placement = Callable[[str, tuple[int, ...]], NamedSharding]
"""(path of a parameter, its shape) -> its sharding."""


def fill(
    make: Callable[[], M],
    family: Family,
    tensors: Mapping[str, np.ndarray],
    name: str,
    dtype: Any = jnp.float32,
    placement: Placement | None = None,
) -> M:
    """The module that `make` builds, with its parameters taken from tensors.

    Each tensor is read once and goes straight to its place. The host holds one at a time.

    Args:
        make: builds the module; it is only evaluated abstractly.
        family: maps the module's parameter paths to the names in `tensors`.
        tensors: by Hugging Face's names; matrices are `(out, in)`, any float dtype.
        name: the model's name, for error messages.
        dtype: of the parameters.
        placement: the shardings on a mesh; None for the default device.
    """
    graphdef, state = nnx.split(nnx.eval_shape(make))
    flat = []
    for keys, variable in nnx.to_flat_state(state):
        path, shape = "/".join(map(str, keys)), variable.shape
        sharding = None if placement is None else placement(path, shape)
        try:
            value = _read(family, path, shape, tensors, dtype, sharding)
        except KeyError as error:
            raise UserError(
                f"The weights of {name} lack {error.args[0]}, which its config.json requires: "
                "fetch them again."
            ) from error
        except ValueError as error:
            raise UserError(
                f"The weights of {name} do not fit its config.json: {error}."
            ) from error
        flat.append((keys, variable.replace(value)))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _read(
    family: Family,
    path: str,
    shape: tuple[int, ...],
    tensors: Mapping[str, np.ndarray],
    dtype: Any,
    sharding: NamedSharding | None,
) -> jax.Array:
    """One parameter in its place; stacked layers are read one after another."""

    def read(path: str, shape: tuple[int, ...], sharding: NamedSharding | None) -> jax.Array:
        (name,) = family.hf_tensors(path, shape)
        value = family.from_hf(path, shape, {name: tensors[name]})
        return jnp.asarray(value) if sharding is None else put(value, sharding)

    if LAYER not in family.hf_module(path.rpartition("/")[0]):
        return _cast(read(path, shape, sharding), dtype)
    of_layer = None
    if sharding is not None:
        of_layer = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    stacked = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()
    first, _, rest = path.partition("/")
    for layer in range(shape[0]):
        stacked = _set_layer(stacked, read(f"{first}/{layer}/{rest}", shape[1:], of_layer), layer)
    return stacked


@functools.partial(jax.jit, static_argnums=1)
def _cast(value: jax.Array, dtype: Any) -> jax.Array:
    return value.astype(dtype)


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stacked: jax.Array, value: jax.Array, layer: int) -> jax.Array:
    return stacked.at[layer].set(value.astype(stacked.dtype))


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(
            f"--model {name} needs huggingface_hub: pip install huggingface_hub, or pass a local "
            "folder."
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.jinja", "*.safetensors"]))
    except Exception as error:  # no network, no repository, gated: one message for all
        raise UserError(
            f"Cannot fetch {name} from the Hugging Face hub ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}). Check the name and the network, or pass a local "
            "folder."
        ) from error
