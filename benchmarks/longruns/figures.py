"""Draws the figure of a task in docs/longruns.md from its results.

    python -m benchmarks.longruns figures --task language

It has up to three panels, where there are results: the test loss along a run, the part of the gap
between LoFT and full fine-tuning that renewals close by their interval, and the best learning rate
by rank. Lines are means over seeds at the best rate, bands and bars the standard deviation.
"""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import records
from benchmarks.longruns.bench import Run, add_sizes, file_of, rows_of, sizes_of
from benchmarks.longruns.methods import METHODS
from benchmarks.longruns.suite import best_rate
from benchmarks.longruns.table import at_best, rows_at_best
from benchmarks.longruns.tasks import TASKS, task

FOLDER = Path(__file__).parents[2] / "docs" / "images"
RANK = 4
"""Of the first two panels."""

CURVES = {
    "full": ("full fine-tuning", "#222222"),
    "full-rank-4": ("full, steps of rank 4", "#999999"),
    "full-rank-4-feedback": ("the same, the rest kept", "#cccccc"),
    "lora": ("LoRA", "#d1495b"),
    "loft": ("LoFT", "#00798c"),
    "loft-anew-250": ("LoFT, drawn anew every 250", "#edae49"),
    "momentum-250": ("LoFT, renewed every 250", "#7a9e7e"),
}
KINDS = {
    r"loft-anew-(\d+)": ("drawn anew", "#edae49"),
    r"momentum-(\d+)": ("renewed: momentum", "#7a9e7e"),
    r"random-(\d+)-small": ("renewed: random, size 0.1", "#8d5a97"),
}
"""Methods of one kind and many intervals."""
BY_RANK = {
    "lora": ("LoRA", "#d1495b"),
    "rslora": ("rsLoRA", "#e8899a"),
    "dora": ("DoRA", "#8d5a97"),
    "loft-dora": ("DoRA with LoFT", "#3d405b"),
    "loft": ("LoFT", "#00798c"),
}

Rows = Mapping[Run, records.Row]
Panel = Callable[[Any], None]
"""Draws on matplotlib axes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=TASKS, default="language")
    parser.add_argument("--results", type=Path, help="the file, if it is not the task's own")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default: docs/images")
    add_sizes(parser)


def run(options: argparse.Namespace) -> None:
    rows = rows_of(file_of(options), sizes_of(options))
    path = options.folder / f"longruns_{options.task}.png"
    panels = [curve_panel(rows, task(options.task).UNIT), interval_panel(rows), rank_panel(rows)]
    draw([panel for panel in panels if panel is not None], path)
    print(path)


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Draws panels side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (4.6 * len(panels), 3.8)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for one, panel in zip(axes[0], panels, strict=True):
        panel(one)
        one.grid(alpha=0.3)
        one.legend(fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def curve_panel(rows: Rows, unit: str) -> Panel | None:
    """The panel of test losses by step."""
    found = {name: curves(rows, name) for name in CURVES}
    found = {name: x for name, x in found.items() if x is not None}
    if not found:
        return None

    def panel(axes: Any) -> None:
        for name, (steps, losses) in found.items():
            label, color = CURVES[name]
            mean, spread = losses.mean(axis=0), losses.std(axis=0, ddof=min(1, len(losses) - 1))
            axes.plot(steps, mean, "o-", color=color, label=f"{label} ({len(losses)})", ms=3)
            axes.fill_between(steps, mean - spread, mean + spread, color=color, alpha=0.2, lw=0)
        axes.set(xlabel="step", ylabel=f"test loss, {unit} (number of seeds)")

    return panel


def interval_panel(rows: Rows) -> Panel | None:
    """The panel of gaps closed by the interval of the renewals."""
    lines = {kind: gaps_by_interval(rows, pattern) for pattern, (kind, _) in KINDS.items()}
    colors = dict(KINDS.values())
    if max(map(len, lines.values())) < 2:
        return None

    def panel(axes: Any) -> None:
        for kind, points in lines.items():
            if points:
                x, mean, spread = zip(*points, strict=True)
                axes.errorbar(
                    x, mean, spread, fmt="o-", color=colors[kind], label=kind, ms=3, capsize=2
                )
        axes.axhline(0, color="#00798c", lw=1)
        axes.set_xscale("log")
        ticks = sorted({point[0] for points in lines.values() for point in points})
        axes.set_xticks(ticks, map(str, ticks), minor=False)
        axes.minorticks_off()
        axes.set(xlabel="interval, steps", ylabel="gap to full fine-tuning closed, %")

    return panel


def rank_panel(rows: Rows) -> Panel | None:
    """The panel of the best rates by rank."""
    lines = {name: rates_by_rank(rows, name) for name in BY_RANK}
    if max(map(len, lines.values())) < 2:
        return None
    full = {best_rate(rows, "full", None)} if any(run.method == "full" for run in rows) else set()

    def panel(axes: Any) -> None:
        for shift, (name, points) in enumerate(lines.items()):
            if points:
                label, color = BY_RANK[name]
                x, y = zip(*points, strict=True)
                # Lines of the same rates lie beside each other.
                axes.plot(x, np.multiply(y, 1.04**shift), "o-", color=color, label=label, ms=3)
        for rate in full:
            axes.axhline(rate, color="#222222", lw=1, label="full fine-tuning")
        ticks = sorted({rank for points in lines.values() for rank, _ in points})
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(ticks, map(str, ticks))
        rates = sorted({rate for points in lines.values() for _, rate in points} | full)
        axes.set_yticks(rates, [f"{rate:g}" for rate in rates])
        axes.minorticks_off()
        axes.set(xlabel="rank", ylabel="best learning rate of the grid")

    return panel


def curves(rows: Rows, method: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns steps, `(points,)`, and test losses at the best rate, `(seeds, points)`."""
    cell = (method, None if METHODS[method].full else RANK)
    found = [row["curve"] for row in rows_at_best(rows, cell).values() if row["loss"] is not None]
    if not found:
        return None
    return np.asarray(found[0])[:, 0], np.asarray(found)[:, :, 1]


def gaps_by_interval(rows: Rows, pattern: str) -> list[tuple[int, float, float]]:
    """Returns intervals, and mean and deviation over seeds of the gap closed, in percent."""
    full, loft = at_best(rows, ("full", None)), at_best(rows, ("loft", RANK))
    found = []
    for method in METHODS:
        match = re.fullmatch(pattern, method)
        ours = at_best(rows, (method, RANK)) if match else {}
        seeds = sorted(full.keys() & loft.keys() & ours.keys())
        if match and seeds:
            gap = np.mean([loft[k] - full[k] for k in seeds])
            closed = 100 * np.asarray([loft[k] - ours[k] for k in seeds]) / gap
            spread = closed.std(ddof=min(1, len(seeds) - 1))
            found.append((int(match[1]), float(closed.mean()), float(spread)))
    return sorted(found)


def rates_by_rank(rows: Rows, method: str) -> list[tuple[int, float]]:
    """Returns ranks and best rates."""
    ranks = sorted({run.rank for run in rows if run.method == method and run.rank is not None})
    return [(rank, best_rate(rows, method, rank)) for rank in ranks]
