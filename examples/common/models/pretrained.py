"""Pretrained weights: folders in Hugging Face's format, and filling a model with tensors."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from loft_jax.adapters import Family

from ..errors import UserError

M = TypeVar("M", bound=nnx.Module)


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


def read_safetensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder, from one file or from shards."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index)["weight_map"].values()))
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise UserError(f"{folder} has no *.safetensors file (PyTorch's .bin is not supported).")
    tensors: dict[str, np.ndarray] = {}
    for name in names:
        try:
            tensors |= load_file(folder / name)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"Cannot read {folder / name} ({error}): it is missing or truncated; fetch it "
                "again."
            ) from error
    return tensors


def fill(make: Callable[[], M], family: Family, tensors: Mapping[str, np.ndarray], name: str) -> M:
    """The module that `make` builds, with its parameters taken from tensors, in float32.

    Args:
        make: builds the module; it is only evaluated abstractly.
        family: maps the module's parameter paths to the names in `tensors`.
        tensors: by Hugging Face's names; matrices are `(out, in)`, any float dtype.
        name: the model's name, for error messages.
    """
    graphdef, state = nnx.split(nnx.eval_shape(make))
    flat = []
    for path, variable in nnx.to_flat_state(state):
        try:
            value = family.from_hf("/".join(map(str, path)), variable.shape, tensors)
        except KeyError as error:
            raise UserError(
                f"The weights of {name} lack {error.args[0]}, which its config.json requires: "
                "fetch them again."
            ) from error
        except ValueError as error:
            raise UserError(
                f"The weights of {name} do not fit its config.json: {error}."
            ) from error
        flat.append((path, variable.replace(jnp.asarray(value.astype(np.float32)))))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


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
