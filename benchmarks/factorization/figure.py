"""The figure of docs/results.md."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

INK, LOFT = "#30343a", "#1f77b4"
OTHERS = ("#d1495b", "#e9a03b", "#4c9f70", "#8a63b8", "#7b6a58", "#3aa6b9", "#c66fa8")
REFERENCE = {"full fine-tuning": (INK, "--", 1.6), "LoFT": (LOFT, "-", 2.6)}
PANELS = {
    "LoFT and its ablations": (
        "full fine-tuning",
        "LoFT",
        "LoRA",
        "LoFT, no alternation",
        "LoFT, no calibration",
        "LoFT, neither",
        "LoFT, block 2 off",
        "LoFT, block 5 off",
    ),
    "Variants": (
        "full fine-tuning",
        "LoFT",
        "LoFT, factored",
        "LoFT (simple)",
        "LoFT (simple), raw factors",
        "LoFT-SGD, momentum",
        "full, momentum",
        "LoFT-Muon",
        "full, Muon",
    ),
    "Baselines": (
        "full fine-tuning",
        "LoFT",
        "LoRA+",
        "scaled AdamW",
        "LoRA-FA",
        "AltLoRA+",
        "LoRA-Pro",
        "AltLoRA",
        "scaled SGD",
    ),
}
REGIMES = ("paper's setting", "Adam regime")


def draw(found: dict[str, Any], path: Path) -> None:
    """Losses in both regimes, final loss against learning rate, distances to exact trajectories.

    Args:
      found: the result of `measure`.
      path: the PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 8, "axes.titlesize": 9, "axes.titleweight": "bold"})
    figure, axes = plt.subplots(3, 3, figsize=(12.6, 11.4), dpi=140, layout="constrained")
    for row, regime in zip(axes, REGIMES, strict=False):
        for ax, (title, labels) in zip(row, PANELS.items(), strict=True):
            _losses(ax, found[regime], labels)
            ax.set_title(f"{title}: {regime}", loc="left")
    _sweep(axes[2, 0], found["sweep"], found["swept"])
    exact = dict(found["exact"])
    _distances(axes[2, 1], {k: v for k, v in exact.items() if k.startswith("Lemma")})
    axes[2, 1].set_title("Distance to the exact path: the lemmas", loc="left")
    _distances(axes[2, 2], {k: v for k, v in exact.items() if k.startswith("full rank")})
    axes[2, 2].set_title("Distance to the exact path: full rank", loc="left")
    for ax in axes.flat:
        ax.set_yscale("log")
        ax.grid(color="#e8e8e8", linewidth=0.7)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=6.6, ncols=1, handlelength=1.6, labelspacing=0.3)
    figure.savefig(path)
    plt.close(figure)


def _losses(ax: Any, runs: dict[str, np.ndarray], labels: Sequence[str]) -> None:
    """The median over seeds, and the range."""
    colors = iter(OTHERS)
    for label in (x for x in labels if x in runs):
        # Full fine-tuning of another family has the color of the LoFT before it.
        if label in REFERENCE:
            style = REFERENCE[label]
        elif label.startswith("full"):
            style = (style[0], "--", 1.2)
        else:
            style = (next(colors), "-", 1.3)
        curve = np.where(np.isfinite(runs[label]), runs[label], np.nan)
        steps = np.arange(curve.shape[1])
        color, line, width = style
        order = 3 if label in REFERENCE else 2
        ax.plot(steps, np.median(curve, 0), line, color=color, lw=width, label=label, zorder=order)
        ax.fill_between(steps, curve.min(0), curve.max(0), color=color, alpha=0.15, lw=0)
    ax.set_ylim(1e-17, 1e2)
    ax.set_xlabel("step")
    ax.set_ylabel("loss / initial loss")


def _sweep(ax: Any, sweep: dict[tuple[str, float], np.ndarray], labels: Sequence[str]) -> None:
    colors = iter(OTHERS)
    for label in labels:
        color, line, width = REFERENCE.get(label) or (next(colors), "-", 1.3)
        rates = sorted(rate for name, rate in sweep if name == label)
        final = np.array([np.nan_to_num(sweep[label, r][:, -1], nan=1e2) for r in rates])
        ax.plot(rates, np.median(final, 1), line, color=color, lw=width, marker="o", ms=3.5)
        ax.lines[-1].set_label(label)
        ax.fill_between(rates, final.min(1), final.max(1), color=color, alpha=0.15, lw=0)
    ax.set_xscale("log")
    ax.set_xlabel("learning rate")
    ax.set_ylabel("final loss / initial loss")
    ax.set_title("Adam regime: final loss against learning rate", loc="left")


def _distances(ax: Any, exact: dict[str, np.ndarray]) -> None:
    names = list(dict.fromkeys(label.rpartition(", ")[0] for label in exact))
    for name, color in zip(names, (LOFT, *OTHERS), strict=False):
        for dtype, line in (("float64", "-"), ("float32", "--")):
            label = f"{name}, {dtype}"
            distance = np.maximum(exact[label], 1e-18)
            ax.plot(np.arange(1, len(distance) + 1), distance, line, color=color, lw=1.5)
            ax.lines[-1].set_label(label)
    ax.set_ylim(1e-17, 1e-2)
    ax.set_xlabel("step")
    ax.set_ylabel("relative distance of W")
