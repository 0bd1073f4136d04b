"""Draws the figures of docs/cost.md from the results of the other benchmarks of cost.

    python -m benchmarks.cost figures

Each point is the latest row of its kind in benchmarks/cost/results.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cost.timing import RESULTS
from benchmarks.records import Row, read

INK, LOFT, FACTORED = "#30343a", "#1f77b4", "#4c9f70"
STYLES: dict[str, tuple[str, str]] = {
    "optax.adamw": (INK, "AdamW (LoRA)"),
    "LoRA": (INK, "AdamW (LoRA)"),
    "optax.contrib.muon": ("#7b6a58", "Muon"),
    "calibrated": (LOFT, "LoFT"),
    "factored": (FACTORED, "LoFT, factored"),
    "simple": ("#8a63b8", "LoFT (simple)"),
    "PyTorch, plain": ("#d1495b", "LoFT typed plainly in PyTorch"),
}
PAPER = 3.23
"""The paper's Table 12: LoFT's step over LoRA's at rank 16, LLaMA-7B on a GPU."""


def latest(rows: Sequence[Row], *keys: str) -> list[Row]:
    """The last of the rows that agree in all these keys."""
    return list({tuple(row.get(key) for key in keys): row for row in rows}.values())


def line(axes: Any, rows: Sequence[Row], name: str, x: Callable[[Row], float], column: str) -> None:
    """Draws the median of one method, and the quartiles if the rows have them."""
    color, label = STYLES[name]
    rows = sorted((row for row in rows if row.get(column) is not None), key=x)
    if not rows:
        return
    at = [x(row) for row in rows]
    values = [row[column] if isinstance(row[column], list) else [row[column]] * 3 for row in rows]
    axes.plot(at, [v[1] for v in values], color=color, label=label, marker="o", markersize=3)
    axes.fill_between(at, [v[0] for v in values], [v[2] for v in values], color=color, alpha=0.2)


def draw_ranks(axes: Any, rows: Sequence[Row], pairs: str, column: str, unit: str) -> None:
    """Draws time or state of the optimizer alone against the rank."""
    for name in STYLES:
        mine = [row for row in rows if (row["pairs"], row["optimizer"]) == (pairs, name)]
        line(axes, mine, name, lambda row: row["rank"], column)
    axes.set(xscale="log", yscale="log", xlabel="rank", ylabel=unit)
    axes.set_xscale("log", base=2)


def optimizer_figure(plt: Any, out: Path) -> None:
    """Draws cost_optimizer.png."""
    rows = latest(read(RESULTS / "optimizer_step.jsonl"), "pairs", "rank", "optimizer")
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    pairs = "smollm2, stacked"
    draw_ranks(panels[0], rows, pairs, "step_ms", "step, ms")
    draw_ranks(panels[1], rows, pairs, "state_mb", "state, MB")
    panels[0].set_title("Optimizer alone, SmolLM2's 150 pairs, two CPU cores", fontsize=9)
    panels[1].set_title("Its state", fontsize=9)
    panels[0].legend(fontsize=7)
    save(plt, figure, out / "cost_optimizer.png")


def training_figure(plt: Any, out: Path) -> None:
    """Draws cost_training.png."""
    rows = latest(read(RESULTS / "training_step.jsonl"), "rank", "batch", "method")
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name in ("calibrated", "factored"):
        mine = [row for row in rows if (row["rank"], row["method"]) == (16, name)]
        line(panels[0], mine, name, lambda row: float(tokens_of(row["batch"])), "ratio")
    panels[0].axhline(1, color=INK, linewidth=0.8)
    panels[0].set(xlabel="tokens a step", ylabel="step / LoRA's step")
    panels[0].set_xscale("log", base=2)
    panels[0].set_title("Training step of SmolLM2-135M, r = 16", fontsize=9)
    panels[0].legend(fontsize=7)
    mine = [row for row in rows if (row["rank"], row["batch"]) == (16, "4x128")]
    mine.sort(key=lambda row: row["ratio"][1])
    for place, row in enumerate(mine):
        low, median, high = row["ratio"]
        color = STYLES.get(row["method"], ("#a8adb5", ""))[0]
        panels[1].barh(place, median, xerr=[[median - low], [high - median]], color=color)
    panels[1].axvline(PAPER, color="#d1495b", linestyle="--", linewidth=1)
    panels[1].text(PAPER, 0, " LoFT,\n the paper's\n (GPU)", fontsize=7, color="#d1495b")
    panels[1].set_yticks(range(len(mine)), [row["method"] for row in mine], fontsize=7)
    panels[1].set(xlabel="step / LoRA's step, 4 x 128 tokens", xlim=(0, 4))
    save(plt, figure, out / "cost_training.png")


def tokens_of(batch: str) -> int:
    """Tokens of a batch such as "4x128"."""
    rows, length = map(int, batch.split("x"))
    return rows * length


def growth_figure(plt: Any, out: Path) -> None:
    """Draws cost_growth.png."""
    rows = latest(read(RESULTS / "growth.jsonl"), "axis", "value", "optimizer")
    figure, panels = plt.subplots(2, 4, figsize=(12, 5.6), layout="constrained")
    titles = {
        "rank": "rank (1024 x 1024, one pair)",
        "size": "m = n (r = 16, one pair)",
        "pairs": "pairs (1024 x 1024, r = 16)",
        "devices": "devices (LLaMA-7B, r = 16)",
    }
    for column, (axis, title) in enumerate(titles.items()):
        for name in ("optax.adamw", "calibrated", "factored"):
            mine = [row for row in rows if (row["axis"], row["optimizer"]) == (axis, name)]
            value = lambda row: row["value"]
            top = "temporary_mb" if axis == "devices" else "step_ms"
            line(panels[0, column], mine, name, value, top)
            line(panels[1, column], mine, name, value, "state_mb")
        label = "temporaries a device, MB" if axis == "devices" else "step, ms"
        panels[0, column].set(ylabel=label, yscale="log")
        panels[1, column].set(ylabel="state, MB", xlabel=title, yscale="log")
        for panel in panels[:, column]:
            panel.set_xscale("log", base=2)
    panels[0, 0].legend(fontsize=7)
    save(plt, figure, out / "cost_growth.png")


def save(plt: Any, figure: Any, path: Path) -> None:
    """Writes a figure without frames and with a light grid."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "folder for the figures (default docs/images)"
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help=text)


def run(options: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for draw in (optimizer_figure, training_figure, growth_figure):
        draw(plt, options.out)
