"""Files and folders give the same images; errors name the bad file."""

import numpy as np
import pytest
from PIL import Image

from common.data.images import Images, hold_out, load_images, same_classes
from common.errors import UserError

LABELS = np.array([0, 1, 0, 1, 1], np.uint8)
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)
CLASSES = np.array(["cat", "dog"])


@pytest.fixture
def npz(tmp_path):
    """Writes a file in which some arrays are replaced."""

    def write(**changed):
        arrays = {"images": PIXELS, "labels": LABELS, "classes": CLASSES} | changed
        np.savez(tmp_path / "data.npz", **{k: v for k, v in arrays.items() if v is not None})
        return str(tmp_path / "data.npz")

    return write


@pytest.fixture
def folder(tmp_path):
    for index, (image, label) in enumerate(zip(PIXELS, LABELS, strict=True)):
        path = tmp_path / "pictures" / CLASSES[label] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return tmp_path / "pictures"


def test_a_file_is_read_as_it_was_written(npz):
    data = load_images(npz(), 8)
    np.testing.assert_array_equal(data.images, PIXELS)
    np.testing.assert_array_equal(data.labels, LABELS)
    assert data.classes == ("cat", "dog") and data.labels.dtype == np.int32
    assert load_images(npz(classes=None), 8).classes == ("0", "1")


def test_a_folder_is_read_class_by_class(folder):
    data, order = load_images(str(folder), 8), [0, 2, 1, 3, 4]
    np.testing.assert_array_equal(data.images, PIXELS[order])
    np.testing.assert_array_equal(data.labels, LABELS[order])
    assert data.classes == ("cat", "dog")


def test_grey_and_oblong_images_become_square_ones_of_three_channels(npz):
    assert load_images(npz(images=PIXELS[:, :, :6, 0]), 4).images.shape == (5, 4, 4, 3)


@pytest.mark.parametrize("count", [2, 9, 10, 11, 25])
def test_every_image_is_trained_on_or_held_out_but_not_both(count):
    labels = np.arange(3 * count) % 3
    images = np.arange(3 * count, dtype=np.uint8)[:, None, None, None]
    train, held_out = hold_out(Images(images, labels, ("a", "b", "c")))
    both = np.concatenate([train.images, held_out.images]).ravel()
    assert sorted(both) == list(range(3 * count))
    assert np.bincount(held_out.labels).tolist() == [max(1, count // 10)] * 3


def test_classes_are_the_same_by_name_and_not_by_number(npz):
    train = load_images(npz(), 8)
    other = Images(PIXELS[:2], np.array([0, 1], np.int32), ("dog", "cat"))
    assert same_classes(train, other).labels.tolist() == [1, 0]
    with pytest.raises(UserError, match="lack .cow."):
        same_classes(train, Images(PIXELS[:1], np.array([0]), ("cow",)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": None}, "has no array called images"),
        ({"images": PIXELS[..., :2]}, "shape .5, 8, 8, 2., expected .count, height, width, 3."),
        ({"images": PIXELS / 255}, "dtype float64, expected uint8"),
        ({"labels": LABELS[:4]}, "labels of shape .4,.*for 5 images"),
        ({"labels": LABELS + 0.5}, "expected one integer per image"),
        ({"labels": LABELS + 1}, "labels from 1 to 2, but its 2 classes allow 0 to 1"),
        ({"labels": 0 * LABELS}, "one class only .cat."),
        ({"images": PIXELS[:0], "labels": LABELS[:0]}, "has no images"),
    ],
)
def test_unfit_arrays_are_named(npz, changed, message):
    path = npz(**changed)
    with pytest.raises(UserError, match=f"{path}.*{message}"):
        load_images(path, 8)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04half"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "data.npz").write_bytes(content)
    with pytest.raises(UserError, match="Cannot read .*data.npz"):
        load_images(str(tmp_path / "data.npz"), 8)


def test_a_truncated_file_is_named(npz):
    path = npz()
    with open(path, "rb+") as file:
        file.truncate(800)
    with pytest.raises(UserError, match=f"Cannot read {path}"):
        load_images(path, 8)


def test_a_damaged_image_is_named(folder):
    path = folder / "cat" / "0.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match=f"Cannot read {path}"):
        load_images(str(folder), 8)


def test_folders_without_classes_or_images_are_named(folder, tmp_path):
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="empty has no images"):
        load_images(str(folder), 8)
    with pytest.raises(UserError, match="it needs one folder of images per class"):
        load_images(str(folder / "empty"), 8)
    with pytest.raises(UserError, match="--eval-data missing: there is no such"):
        load_images("missing", 8, "--eval-data")


def test_a_class_of_one_image_cannot_be_split():
    with pytest.raises(UserError, match="'dog' has a single image.*--eval-data"):
        hold_out(Images(PIXELS[:3], np.array([0, 0, 1]), ("cat", "dog")))
