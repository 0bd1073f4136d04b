"""Folders of weights as Hugging Face lays them out, local or fetched from its hub."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from errors import UserError


def find_folder(source: str, contents: str) -> Path:
    """A local folder as it is, or the copy of a hub repository, fetched where it is not cached.

    Args:
        source: what the user gave as `--model`: a folder, or a hub id (owner/name).
        contents: the files that such a folder holds, for the message.
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
    """The object in a JSON file."""
    if not path.is_file():
        raise UserError(
            f"{path.parent} has no {path.name}: pass a folder as save_pretrained writes it."
        )
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot use {path}: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"Cannot use {path}: it holds no JSON object.")
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
        raise UserError(f"{folder} has no *.safetensors file (PyTorch's .bin is not read).")
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


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(
            f"--model {name} needs huggingface_hub: pip install huggingface_hub, or pass a local "
            "folder."
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # no network, no such repository, gated: many types, one remedy
        raise UserError(
            f"Cannot fetch {name} from the Hugging Face hub ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}). Check the name and the network, or pass a local "
            "folder."
        ) from error
