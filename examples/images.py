"""Labelled images: from a .npz file, or from a folder with a folder for each class."""

import dataclasses
import gzip
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import downloads
import numpy as np
from errors import UserError
from PIL import Image, ImageOps

HELD_OUT_EVERY = 10
"""One image in so many of each class is held out: training never sees it."""

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff"}


@dataclasses.dataclass(frozen=True)
class Images:
    """Images of one size, and what is on them. They lie in memory: 150 KB for 224 x 224 pixels."""

    images: np.ndarray
    """uint8 `(count, size, size, 3)`."""
    labels: np.ndarray
    """int32 `(count,)`, places in `classes`."""
    classes: tuple[str, ...]


def load_images(source: str | None, size: int, flag: str = "--data") -> Images:
    """MNIST digits where `source` is None, else a .npz file or a folder, resized to `size`.

    A .npz file has `images`, uint8 `(count, height, width, 3)` (or `(count, height, width)`, grey),
    `labels`, whole numbers, and, if it likes, `classes`, their names. A folder has a folder of
    images for each class. An image that is not square is cut to the square in its middle.
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
        "labels, or a folder that has a folder of images for each class."
    )


def hold_out(data: Images) -> tuple[Images, Images]:
    """Images to train on, and every tenth of each class, held out: no image is in both."""
    held_out = np.zeros(len(data.labels), bool)
    for label, name in enumerate(data.classes):
        places = np.flatnonzero(data.labels == label)
        if len(places) == 1:
            raise UserError(
                f"The class {name!r} has a single image, so none can be held out: add images of "
                "it, or pass --eval-data."
            )
        # Counted from the end of the first ten, so that few images give a held-out one as well.
        held_out[places[min(HELD_OUT_EVERY, len(places)) - 1 :: HELD_OUT_EVERY]] = True
    return _rows(data, ~held_out), _rows(data, held_out)


def same_classes(train: Images, held_out: Images) -> Images:
    """The held-out images with labels that are places in the classes of the training images."""
    if unknown := sorted(set(held_out.classes) - set(train.classes)):
        raise UserError(
            f"--eval-data has classes that the training images lack ({', '.join(unknown[:5])}): "
            "the classes of both must have the same names."
        )
    places = np.array([train.classes.index(name) for name in held_out.classes], np.int32)
    return Images(held_out.images, places[held_out.labels], train.classes)


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
        # Opened here, because numpy leaves a file open that is no archive.
        with path.open("rb") as opened, zipfile.ZipFile(opened) as _:
            opened.seek(0)
            with np.load(opened, allow_pickle=False) as file:
                names = [name for name in ("images", "labels", "classes") if name in file]
                arrays = {name: file[name] for name in names}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"Cannot read {path} ({error}): a .npz file of numpy.savez is expected, with arrays "
            "images and labels; if it was one, it is damaged: fetch it again."
        ) from error
    if missing := [name for name in ("images", "labels") if name not in arrays]:
        raise UserError(f"{path} has no array called {missing[0]}.")
    images, labels = arrays["images"], arrays["labels"]
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] not in (1, 3)):
        raise UserError(
            f"{path} has images of shape {images.shape}: (count, height, width, 3) is expected."
        )
    if images.dtype != np.uint8:
        raise UserError(f"{path} has images of dtype {images.dtype}: uint8 is expected, 0 to 255.")
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{path} has labels of shape {labels.shape} and dtype {labels.dtype} for "
            f"{len(images)} images: one whole number for each is expected."
        )
    if not len(labels):
        raise UserError(f"{path} has no images.")
    highest = int(labels.max())
    names = arrays.get("classes", np.arange(highest + 1)).astype(str).tolist()
    if labels.min() < 0 or highest >= len(names):
        raise UserError(
            f"{path} has labels from {labels.min()} to {highest} where its {len(names)} classes "
            f"allow 0 to {len(names) - 1}."
        )
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    return _checked(path, _resized(list(map(Image.fromarray, images)), size), labels, names)


def _read_folder(folder: Path, size: int) -> Images:
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    if not classes:
        raise UserError(f"{folder} has no folders: it needs one for each class, of its images.")
    images, labels = [], []
    for label, path in enumerate(classes):
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not files:
            raise UserError(
                f"{path} has no images ({', '.join(sorted(SUFFIXES))}): fill it or remove it."
            )
        for file in files:
            try:
                with Image.open(file) as image:
                    images.append(_resized([image], size)[0])
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise UserError(
                    f"Cannot read {file} ({error}): it is no image or damaged; mend or remove it."
                ) from error
        labels += [label] * len(files)
    names = [path.name for path in classes]
    return _checked(folder, np.stack(images), np.array(labels), names)


def _checked(path: Path, images: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Images:
    counts = np.bincount(labels, minlength=len(names))
    if np.count_nonzero(counts) < 2:
        raise UserError(
            f"{path} has images of one class only ({names[int(labels[0])]}): there is nothing to "
            "tell apart; add another class."
        )
    return Images(images, labels.astype(np.int32), tuple(names))


def _resized(images: Sequence[Image.Image], size: int) -> np.ndarray:
    """The square in the middle of each image, uint8 `(count, size, size, 3)`."""

    def fit(image: Image.Image) -> np.ndarray:
        upright = ImageOps.exif_transpose(image).convert("RGB")
        return np.asarray(ImageOps.fit(upright, (size, size), Image.Resampling.BICUBIC))

    return np.stack([fit(image) for image in images])
