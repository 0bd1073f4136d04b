"""The learning curve of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

TRAIN, HELD_OUT = "#6f94b5", "#c8553d"


def draw_curve(records: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Training loss (dots, and their running mean) and held-out perplexity, as a PNG.

    The vertical axis is that of the two lines. Single batches scatter far more than a short
    run learns, so the dots beyond it are left out: metrics.jsonl has them.

    Args:
        records: lines of metrics.jsonl; those with a `loss`, and those with an `eval_loss`.
        path: where to write the image.
        title: the line above it.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import patheffects, ticker

    train = np.array([(r["step"], r["loss"]) for r in records if "loss" in r])
    held_out = np.array([(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r])

    figure, axes = plt.subplots(figsize=(7.2, 4.05), dpi=160, layout="constrained")
    axes.scatter(*train.T, color=TRAIN, s=12, alpha=0.4, linewidths=0)
    steps, means = running_mean(*train.T)
    axes.plot(steps, means, color=TRAIN, linewidth=2, label="training batches")
    axes.plot(*held_out.T, color=HELD_OUT, linewidth=2.4, marker="o", label="held-out text")
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
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    shown = np.concatenate([means, held_out[:, 1]])
    margin = max(np.ptp(shown), 0.1) * np.array([0.15, 0.4])  # above: room for the labels
    axes.set_ylim(shown.min() - margin[0], shown.max() + margin[1])
    axes.margins(x=0.03)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right", ncols=2)
    figure.savefig(path)
    plt.close(figure)


def running_mean(
    steps: np.ndarray, values: np.ndarray, width: int = 9
) -> tuple[np.ndarray, np.ndarray]:
    """The mean of each `width` consecutive values, at the middle step; both `(n,)`."""
    width = min(width, len(values))
    means = np.convolve(values, np.ones(width) / width, mode="valid")
    begin = (width - 1) // 2
    return steps[begin : begin + len(means)], means


def draw_accuracy(records: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Losses of training batches and held-out examples, and the accuracy beside them, as a PNG.

    Args:
        records: lines of metrics.jsonl; those with a `loss`, and those with an `eval_loss` and an
            `eval_accuracy`.
        path: where to write the image.
        title: the line above it.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    train = np.array([(r["step"], r["loss"]) for r in records if "loss" in r])
    measured = np.array(
        [(r["step"], r["eval_loss"], r["eval_accuracy"]) for r in records if "eval_loss" in r]
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.6), dpi=160, layout="constrained")
    if len(train):
        left.scatter(*train.T, color=TRAIN, s=12, alpha=0.4, linewidths=0)
        left.plot(*running_mean(*train.T), color=TRAIN, linewidth=2, label="training batches")
    line = {"color": HELD_OUT, "linewidth": 2.4, "marker": "o"}
    left.plot(measured[:, 0], measured[:, 1], label="held out", **line)
    left.set_ylabel("loss, nats")
    left.set_ylim(bottom=0)
    left.legend(frameon=False)
    right.plot(measured[:, 0], 100 * measured[:, 2], **line)
    right.set_ylabel("held-out accuracy, %")
    right.set_ylim(0, 104)
    for step, _, accuracy in measured[[0, -1]]:
        right.annotate(
            f"{100 * accuracy:.1f}",
            (step, 100 * accuracy),
            xytext=(0, -16) if accuracy > 0.5 else (9, -4),
            textcoords="offset points",
            ha="left" if step == measured[0, 0] else "right",
            color=HELD_OUT,
            fontweight="bold",
        )
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.margins(x=0.03)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.savefig(path)
    plt.close(figure)
