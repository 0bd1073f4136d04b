"""Labelled images from a .npz file or from a folder per class, and the loss on them."""

import dataclasses
import gzip
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image, ImageOps

from .. import downloads
from ..batches import held_out_places
from ..errors import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff"}


@dataclasses.dataclass(frozen=True)
class Images:
    """Images of one size with their labels, in memory (150 KB for 224 x 224 pixels)."""

    images: np.ndarray
    """uint8 `(count, size, size, 3)`."""
    labels: np.ndarray
    """int32 `(count,)`, indices into `classes`."""
    classes: tuple[str, ...]


def load_images(source: str | None, size: int, flag: str = "--data") -> Images:
    """MNIST digits if `source` is None, else a .npz file or a folder; resized to `size`.

    A .npz file contains `images`, uint8 `(count, height, width, 3)` or grey
    `(count, height, width)`; `labels`, integers; and optionally `classes`, their names. A folder
    contains one folder of images per class. Images are cropped to the square in their centre.
    """
    if source is None:
        return _digits(size)
    path = Path(source)
    if path.is_dir():
        return _read_folder(path, size)
    if path.is_file():
        return _read_npz(path, size)
    raise UserError(
        f"{flag} {source}: there is no such file or folder. Pass a .npz file with images and "
        "labels, or a folder with one folder of images per class."
    )


def hold_out(data: Images) -> tuple[Images, Images]:
    """Splits images into a training part and a held-out part, class by class."""
    held_out = np.zeros(len(data.labels), bool)
    for label, name in enumerate(data.classes):
        places = np.flatnonzero(data.labels == label)
        if len(places) == 1:
            raise UserError(
                f"The class {name!r} has a single image, so none can be held out: add images of "
                "it, or pass --eval-data."
            )
        held_out[places[list(held_out_places(len(places)))]] = True
    return _rows(data, ~held_out), _rows(data, held_out)


def same_classes(train: Images, held_out: Images, flag: str = "--eval-data") -> Images:
    """The held-out images, with labels that index the classes of the training images."""
    if unknown := sorted(set(held_out.classes) - set(train.classes)):
        raise UserError(
            f"{flag} has classes that the training images lack ({', '.join(unknown[:5])}): "
            "use the same class names in both."
        )
    places = np.array([train.classes.index(name) for name in held_out.classes], np.int32)
    return Images(held_out.images, places[held_out.labels], train.classes)


def accuracies(data: Images, predictions: np.ndarray) -> dict[str, float]:
    """The fraction of a class's images that are recognized, for each class that has images."""
    right = predictions == data.labels
    return {
        name: float(right[data.labels == label].mean())
        for label, name in enumerate(data.classes)
        if (data.labels == label).any()
    }


def examples_of(data: Images) -> dict[str, np.ndarray]:
    """The images as a tree of arrays, for `classification`."""
    return {"images": data.images, "labels": data.labels}


def classification(model: Any, batch: Any) -> dict[str, jax.Array]:
    """The loss in nats, float32 `(n,)`, and the predicted class, int32 `(n,)`, of each image."""
    logits = model(batch["images"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return {"loss": loss, "prediction": logits.argmax(axis=-1).astype(jnp.int32)}


def classification_loss(model: Any, batch: Any) -> jax.Array:
    """The loss of `classification`."""
    return classification(model, batch)["loss"]


def _rows(data: Images, chosen: np.ndarray) -> Images:
    return Images(data.images[chosen], data.labels[chosen], data.classes)


def _digits(size: int) -> Images:
    lines = gzip.decompress(downloads.read_member(downloads.MNIST_5K)).decode().split()
    table = np.array([line.split(",") for line in lines], np.float32).astype(np.uint8)
    grey, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    names = tuple(str(digit) for digit in range(10))
    return Images(_resized(list(map(Image.fromarray, grey)), size), labels.astype(np.int32), names)


def _read_npz(path: Path, size: int) -> Images:
    try:
        # np.load leaves a file open that is not an archive, so the file is opened here.
        with path.open("rb") as opened, zipfile.ZipFile(opened) as _:
            opened.seek(0)
            with np.load(opened, allow_pickle=False) as file:
                names = [name for name in ("images", "labels", "classes") if name in file]
                arrays = {name: file[name] for name in names}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"Cannot read {path} ({error}): pass a .npz file from numpy.savez with the arrays "
            "images and labels. If it is one, it is damaged: fetch it again."
        ) from error
    if missing := [name for name in ("images", "labels") if name not in arrays]:
        raise UserError(f"{path} has no array called {missing[0]}.")
    images, labels = arrays["images"], arrays["labels"]
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] not in (1, 3)):
        raise UserError(
            f"{path} has images of shape {images.shape}, expected (count, height, width, 3)."
        )
    if images.dtype != np.uint8:
        raise UserError(f"{path} has images of dtype {images.dtype}, expected uint8 from 0 to 255.")
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{path} has labels of shape {labels.shape} and dtype {labels.dtype} for "
            f"{len(images)} images, expected one integer per image."
        )
    if not len(labels):
        raise UserError(f"{path} has no images.")
    highest = int(labels.max())
    names = arrays.get("classes", np.arange(highest + 1)).astype(str).tolist()
    if labels.min() < 0 or highest >= len(names):
        raise UserError(
            f"{path} has labels from {labels.min()} to {highest}, but its {len(names)} classes "
            f"allow 0 to {len(names) - 1}."
        )
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    return _checked(path, _resized(list(map(Image.fromarray, images)), size), labels, names)


def _read_folder(folder: Path, size: int) -> Images:
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    if not classes:
        raise UserError(f"{folder} has no folders: it needs one folder of images per class.")
    images, labels = [], []
    for label, path in enumerate(classes):
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not files:
            raise UserError(
                f"{path} has no images ({', '.join(sorted(SUFFIXES))}): add some, or remove the "
                "folder."
            )
        for file in files:
            try:
                with Image.open(file) as image:
                    images.append(_resized([image], size)[0])
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise UserError(
                    f"Cannot read {file} ({error}): it is damaged or not an image; replace or "
                    "remove it."
                ) from error
        labels += [label] * len(files)
    names = [path.name for path in classes]
    return _checked(folder, np.stack(images), np.array(labels), names)


def _checked(path: Path, images: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Images:
    counts = np.bincount(labels, minlength=len(names))
    if np.count_nonzero(counts) < 2:
        raise UserError(
            f"{path} has images of one class only ({names[int(labels[0])]}): add another class."
        )
    return Images(images, labels.astype(np.int32), tuple(names))


def _resized(images: Sequence[Image.Image], size: int) -> np.ndarray:
    """The central square of each image, uint8 `(count, size, size, 3)`."""

    def fit(image: Image.Image) -> np.ndarray:
        upright = ImageOps.exif_transpose(image).convert("RGB")
        return np.asarray(ImageOps.fit(upright, (size, size), Image.Resampling.BICUBIC))

    return np.stack([fit(image) for image in images])
