"""What a classifier has made of its test images: some of them, and the confusion matrix."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

RIGHT, WRONG = "#2e7d4f", "#c8553d"
MOST_NUMBERS = 20
"""A confusion matrix of more classes has no numbers in its cells: they would not be read."""


def draw_predictions(
    images: np.ndarray,
    labels: np.ndarray,
    predictions: np.ndarray,
    classes: Sequence[str],
    path: Path,
    title: str,
) -> None:
    """Test images with what was predicted, and the truth where that was wrong, as a PNG.

    Args:
        images: uint8 `(count, size, size, 3)`.
        labels, predictions: whole numbers `(count,)`, places in `classes`.
        classes: their names.
        path: where to write the image.
        title: the line above it.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(8, len(images))
    rows = -(-len(images) // columns)
    figure, all_axes = plt.subplots(
        rows,
        columns,
        figsize=(1.15 * columns, 1.4 * rows + 0.4),
        dpi=160,
        layout="constrained",
        squeeze=False,
    )
    for axes in all_axes.flat:
        axes.axis("off")
    for axes, image, label, predicted in zip(
        all_axes.flat, images, labels, predictions, strict=False
    ):
        axes.imshow(image)
        good = label == predicted
        name = classes[predicted] if good else f"{classes[predicted]}\nnot {classes[label]}"
        color = RIGHT if good else WRONG
        axes.text(
            0.5, -0.05, name, transform=axes.transAxes, ha="center", va="top", color=color, size=8
        )
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.savefig(path)
    plt.close(figure)


def draw_confusion(matrix: np.ndarray, classes: Sequence[str], path: Path, title: str) -> None:
    """How often images of each class were taken for each other one, as a PNG.

    Args:
        matrix: counts, `(classes, classes)`; the true class is the row.
        classes: their names.
        path: where to write the image.
        title: the line above it.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(3.4 + 0.32 * len(classes), 12)
    figure, axes = plt.subplots(figsize=(side, side), dpi=160, layout="constrained")
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(classes) <= MOST_NUMBERS:
        for (row, column), number in np.ndenumerate(matrix):
            if number:
                color = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, number, ha="center", va="center", color=color, size=8)
        axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
        axes.set_yticks(range(len(classes)), classes)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title, fontsize=10, fontweight="bold", loc="left")
    figure.savefig(path)
    plt.close(figure)


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """Counts `(classes, classes)`, the true class by row, the predicted one by column."""
    matrix = np.zeros((classes, classes), int)
    np.add.at(matrix, (labels, predictions), 1)
    return matrix
