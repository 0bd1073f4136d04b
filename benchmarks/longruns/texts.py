"""The texts of the language runs: Python's standard library, and random windows of bytes."""

import argparse
import gzip
import sysconfig
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from examples.common.errors import UserError

HELD_OUT_BATCHES = 64
"""Batches of the validation loss, and of the test loss."""


class Texts(NamedTuple):
    """Bytes, as uint8 arrays."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def python_sources() -> Texts:
    """Returns the sources of the standard library, a tenth of the files held out for each loss."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(x for x in folder.rglob("*.py") if "site-packages" not in x.parts)
    files = [x for x in files if "test" not in x.parts and "idle_test" not in x.parts]
    split: list[list[bytes]] = [[], [], []]
    for file in files:
        bucket = zlib.crc32(str(file.relative_to(folder)).encode()) % 10
        split[{0: 2, 1: 1}.get(bucket, 0)].append(file.read_bytes())
    return Texts(*(np.frombuffer(b"\n".join(part), np.uint8) for part in split))


def read_text(options: argparse.Namespace) -> np.ndarray:
    """Returns the bytes of the file of --text, which may be gzipped."""
    path: Path | None = options.text
    if path is None:
        raise UserError("There is no pretrained model yet: give a --text to train on first.")
    data = path.read_bytes()
    return np.frombuffer(gzip.decompress(data) if path.suffix == ".gz" else data, np.uint8)


def windows(
    text: np.ndarray, rng: np.random.Generator, count: int, batch: int, length: int
) -> jax.Array:
    """Returns `count` batches of random windows, `(count, batch, length + 1)`."""
    starts = rng.integers(0, len(text) - length - 1, (count, batch, 1))
    return jnp.asarray(text[starts + np.arange(length + 1)])


def held_out(text: np.ndarray, batch: int, length: int) -> jax.Array:
    """Returns the batches of a held-out text: the same in all runs."""
    return windows(text, np.random.default_rng(0), HELD_OUT_BATCHES, batch, length)
