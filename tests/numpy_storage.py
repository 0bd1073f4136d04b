"""NumPy files in place of Orbax's, so that tests against models can try thousands of sequences.

What surrounds the files of arrays stays the package's: the record, digests, reading back, flushing,
renaming, deleting, the lock.
"""

import json
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jaxtyping
import numpy as np
import pytest

from loft_jax.checkpoint import _storage

IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where to make folders whose flushes take no time, as of `tempfile`."""


def begin(folder: Path, arrays: _storage.Arrays) -> Callable[[Mapping[str, Any]], None]:
    """As `_storage.begin`."""
    return lambda meta: _write(folder, arrays, meta)


def _write(folder: Path, arrays: _storage.Arrays, meta: Mapping[str, Any]) -> None:
    for item, leaves in arrays.items():
        (folder / item).mkdir(parents=True)
        on_host = {path: np.asarray(x) for path, x in leaves.items()}
        (folder / item / "arrays").write_bytes(pickle.dumps(on_host))
    (folder / "meta").mkdir(parents=True)
    (folder / "meta" / "metadata").write_text(json.dumps(meta))


def read(
    folder: Path, saved: Mapping[str, Any], shardings: Mapping[str, Any], partial: bool = False
) -> dict[str, Any]:
    """As `_storage.read`."""
    arrays = pickle.loads((folder / "arrays").read_bytes())
    place = lambda x, sharding: x if sharding is None else jax.device_put(x, sharding)
    return {path: place(arrays[path], shardings[path]) for path in saved}


def read_back(folder: Path, paths: Iterable[str]) -> dict[str, np.ndarray]:
    """As `_storage.read_back`."""
    return read(folder, dict.fromkeys(paths), dict.fromkeys(paths))


@pytest.fixture
def numpy_storage(monkeypatch) -> Iterator[None]:
    """Lets `Checkpoints` write NumPy files. Other tests check the types of its functions."""
    monkeypatch.setattr(_storage, "begin", begin)
    monkeypatch.setattr(_storage, "read", read)
    monkeypatch.setattr(_storage, "read_back", read_back)
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
