"""Figures of a run: learning curves, predictions and the confusion matrix."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

TRAIN, HELD_OUT = "#6f94b5", "#c8553d"
METHODS = ("#c8553d", "#6f94b5", "#3f3f3f", "#8a9a5b", "#b08ab5")
"""Colors of the methods in a comparison."""
RIGHT, WRONG = "#2e7d4f", "#c8553d"
MOST_NUMBERS = 20
"""Largest number of classes for which a confusion matrix shows its counts."""

_LINE = {"color": HELD_OUT, "linewidth": 2.4, "marker": "o"}


def draw_perplexity(records: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draws the training loss (batches and their running mean) and the held-out perplexity.

    The losses of single batches vary more than a short run improves. The vertical axis therefore
    covers the two lines only; metrics.jsonl has all values.

    Args:
        records: lines of metrics.jsonl.
        path: of the PNG.
        title: the line above the axes.
    """
    from matplotlib import patheffects

    plt = _pyplot()
    held_out = np.array([(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r])
    figure, axes = plt.subplots(figsize=(7.2, 4.05), dpi=160, layout="constrained")
    means = _draw_training_loss(axes, records)
    axes.plot(*held_out.T, label="held out", **_LINE)
    halo = [patheffects.withStroke(linewidth=4, foreground="white")]
    for index, (step, loss) in enumerate(held_out):
        axes.annotate(
            f"perplexity {np.exp(loss):.1f}" if index == 0 else f"{np.exp(loss):.1f}",
            (step, loss),
            xytext=(-4 if index == 0 else 0, 9),
            textcoords="offset points",
            ha="left" if index == 0 else "center",
            color=HELD_OUT,
            fontweight="bold",
            path_effects=halo,
        )
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=12)
    axes.set_ylabel("loss (nats per token)")
    shown = np.concatenate([means, held_out[:, 1]])
    margin = max(np.ptp(shown), 0.1) * np.array([0.15, 0.4])  # the labels need room at the top
    axes.set_ylim(shown.min() - margin[0], shown.max() + margin[1])
    axes.legend(frameon=False, loc="upper right", ncols=2)
    _style(axes)
    _write(figure, path)


def draw_comparison(
    curves: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, title: str
) -> None:
    """Draws the held-out losses of several methods.

    Args:
        curves: lines of metrics.jsonl by the label of the method; the first is emphasized.
        path: of the PNG.
        title: the line above the axes.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7.2, 4.05), dpi=160, layout="constrained")
    ends = []
    for (label, records), color in zip(curves.items(), itertools.cycle(METHODS)):
        held_out = np.array([(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r])
        first = label == next(iter(curves))
        width = 2.8 if first else 1.8
        axes.plot(*held_out.T, color=color, linewidth=width, marker="o", zorder=3 if first else 2)
        ends.append((held_out[-1, 1], label, color))
    # The labels stand at the ends of the lines, at least a line of text apart.
    low, high = axes.get_ylim()
    place = low - 1
    for loss, label, color in sorted(ends):
        place = max(loss, place + 0.06 * (high - low))
        axes.annotate(
            f"{label}, {np.exp(loss):.1f}",
            (1.01, place),
            xycoords=axes.get_yaxis_transform(),
            va="center",
            color=color,
            fontweight="bold",
        )
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=12)
    axes.set_ylabel("held-out loss (nats per token)")
    _style(axes)
    _write(figure, path)


def draw_accuracy(records: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draws the training and the held-out loss, and beside them the held-out accuracy.

    Args:
        records: lines of metrics.jsonl.
        path: of the PNG.
        title: the line above the axes.
    """
    plt = _pyplot()
    steps, losses, accuracies = np.array(
        [(r["step"], r["eval_loss"], r["eval_accuracy"]) for r in records if "eval_loss" in r]
    ).T
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.6), dpi=160, layout="constrained")
    _draw_training_loss(left, records)
    left.plot(steps, losses, label="held out", **_LINE)
    left.set_ylabel("loss (nats)")
    left.set_ylim(bottom=0)
    left.legend(frameon=False)
    right.plot(steps, 100 * accuracies, **_LINE)
    right.set_ylabel("held-out accuracy (%)")
    right.set_ylim(0, 104)
    for index in (0, -1):
        accuracy = accuracies[index]
        right.annotate(
            f"{100 * accuracy:.1f}",
            (steps[index], 100 * accuracy),
            xytext=(0, -16 if accuracy > 0.5 else 9),
            textcoords="offset points",
            ha="left" if index == 0 else "right",
            color=HELD_OUT,
            fontweight="bold",
        )
    for axes in (left, right):
        _style(axes)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    _write(figure, path)


def draw_predictions(
    images: np.ndarray,
    labels: np.ndarray,
    predictions: np.ndarray,
    classes: Sequence[str],
    path: Path,
    title: str,
) -> None:
    """Draws images with their predicted class, and the true class if the prediction is wrong.

    Args:
        images: uint8 `(count, size, size, 3)`.
        labels, predictions: integers `(count,)`, indices into `classes`.
        classes: names.
        path: of the PNG.
        title: the line above the images.
    """
    plt = _pyplot()
    columns = min(8, len(images))
    rows = -(-len(images) // columns)
    size = (1.15 * columns, 1.4 * rows + 0.4)
    figure, grid = plt.subplots(
        rows, columns, figsize=size, dpi=160, layout="constrained", squeeze=False
    )
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, label, predicted in zip(grid.flat, images, labels, predictions, strict=False):
        axes.imshow(image)
        right = label == predicted
        axes.text(
            0.5,
            -0.05,
            classes[predicted] if right else f"{classes[predicted]}\nnot {classes[label]}",
            transform=axes.transAxes,
            ha="center",
            va="top",
            color=RIGHT if right else WRONG,
            size=8,
        )
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    _write(figure, path)


def draw_confusion(
    labels: np.ndarray, predictions: np.ndarray, classes: Sequence[str], path: Path, title: str
) -> None:
    """Draws the confusion matrix; rows are true classes, columns predicted ones.

    Args:
        labels, predictions: integers `(count,)`, indices into `classes`.
        classes: names.
        path: of the PNG.
        title: the line above the matrix.
    """
    plt = _pyplot()
    counts = np.zeros((len(classes), len(classes)), int)
    np.add.at(counts, (labels, predictions), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = min(3.4 + 0.32 * len(classes), 12)
    figure, axes = plt.subplots(figsize=(size, size), dpi=160, layout="constrained")
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(classes) <= MOST_NUMBERS:
        for (row, column), number in np.ndenumerate(counts):
            if number:
                color = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, number, ha="center", va="center", color=color, size=8)
        axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
        axes.set_yticks(range(len(classes)), classes)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title, fontsize=10, fontweight="bold", loc="left")
    _write(figure, path)


def _pyplot() -> Any:
    """pyplot without a display; imported only when a figure is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _draw_training_loss(
    axes: Any, records: Sequence[Mapping[str, Any]], width: int = 9
) -> np.ndarray:
    """Draws the loss of each batch and the mean of `width` consecutive ones; returns the means."""
    steps, losses = np.array([(r["step"], r["loss"]) for r in records if "loss" in r]).T
    width = min(width, len(losses))
    means = np.convolve(losses, np.ones(width) / width, mode="valid")
    begin = (width - 1) // 2
    axes.scatter(steps, losses, color=TRAIN, s=12, alpha=0.4, linewidths=0)
    middles = steps[begin : begin + len(means)]
    axes.plot(middles, means, color=TRAIN, linewidth=2, label="training batches")
    return means


def _style(axes: Any) -> None:
    from matplotlib import ticker

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.margins(x=0.03)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _write(figure: Any, path: Path) -> None:
    figure.savefig(path)
    _pyplot().close(figure)
