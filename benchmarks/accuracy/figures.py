"""The figures of docs/accuracy.md."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.config import Experiment, Task
from benchmarks.accuracy.plan import Results, first_losses
from benchmarks.accuracy.search import rate_at
from benchmarks.accuracy.store import Key
from benchmarks.accuracy.summary import Row, mean_and_error, rows
from benchmarks.accuracy.variants import VARIANTS

COLORS = {
    "zero-shot": "#999999",
    "zero-shot-nf4": "#cccccc",
    "head": "#999999",
    "full": "#222222",
    "lora": "#d1495b",
    "dora": "#8d5a97",
    "lora-nf4": "#e8899a",
    "loft": "#00798c",
    "loft-nf4": "#66b2bd",
    "factored": "#edae49",
    "simple": "#7a9e7e",
}
NAMES = {"wikitext2": "WikiText-2", "cifar10": "CIFAR-10", "arc_easy": "ARC-Easy"}
AXES = {
    "loss": "test loss, nats",
    "accuracy": "test accuracy, %",
    "likelihood": "likelihood of the right answer",
}
MARGIN = 0.25
"""The loss axis ends above the loss before training, by this share of the distance between that and
the lowest loss. Runs above it count as diverged and are marked at the edge."""

Panel = Callable[[Any], None]
"""Draws on matplotlib axes."""


def panels(
    results: Results, experiment: Experiment, read_task: Callable[[str], Task]
) -> list[Panel]:
    """The panels of an experiment's figure that have results."""
    kinds = {"rates": rate_panels, "ranks": rank_panels}
    if experiment.figure is None:
        return []
    make = kinds[experiment.figure]
    return [
        panel for name in experiment.tasks() for panel in make(results, experiment, read_task(name))
    ]


def draw(chosen: Sequence[Panel], path: Path) -> None:
    """Draws panels side by side, with a legend in the first."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (4.6 * len(chosen), 3.8)
    figure, axes = plt.subplots(1, len(chosen), figsize=size, layout="constrained", squeeze=False)
    for one, panel in zip(axes[0], chosen, strict=True):
        panel(one)
        one.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def rate_panels(results: Results, experiment: Experiment, task: Task) -> list[Panel]:
    """The panel of test loss against the learning rate."""
    lines = rate_lines(results, experiment, task)
    return [lambda axes: _draw_rates(axes, lines, task)] if lines else []


Line = Sequence[tuple[float, float | None]]
"""(learning rate, test loss); None for a run that diverged."""


def rate_lines(
    results: Results, experiment: Experiment, task: Task
) -> dict[str, tuple[Line, float]]:
    """The line of each method over the learning rates tried, and the loss before training."""
    found = {}
    for runs in experiment.runs:
        for cell in runs.cells() if runs.task == task.name else ():
            line, before = [], None
            for place in sorted(first_losses(results, cell, runs.seeds[0])):
                record = results[Key(cell, rate_at(place), runs.seeds[0])]
                test = record["test"]
                line.append((rate_at(place), test["loss"] if test else None))
                before = record["train_losses"][0]
            if before is not None:
                found[cell.method] = (line, before)
    return found


def _draw_rates(axes: Any, lines: Mapping[str, tuple[Line, float]], task: Task) -> None:
    befores = [before for _, before in lines.values() if before is not None]
    finite = [x for line, _ in lines.values() for _, x in line if x is not None]
    low, before = min(finite, default=0.0), max(befores)
    top = before + MARGIN * max(before - low, 0.1)
    inside = lambda loss: loss is not None and loss <= top
    for method, (line, _) in lines.items():
        color = COLORS.get(method)
        drawn = [(rate, loss) for rate, loss in line if inside(loss)]
        xs, ys = [rate for rate, _ in drawn], [loss for _, loss in drawn]
        axes.plot(xs, ys, "o-", ms=4, color=color, label=VARIANTS[method].label)
        gone = [rate for rate, loss in line if not inside(loss)]
        if gone:
            axes.plot(gone, [top] * len(gone), "x", color=color, clip_on=False)
    axes.set(xscale="log", xlabel="peak learning rate", ylabel=AXES["loss"])
    axes.set_ylim(top=top)
    axes.set_title(f"{task.model}, {NAMES.get(task.name, task.name)}, rank 4", fontsize=9)


def rank_panels(results: Results, experiment: Experiment, task: Task) -> list[Panel]:
    """The panels of test loss, and of the metric of the task, against the rank."""
    found = rows(results, experiment, task)
    if not found:
        return []
    metrics = dict.fromkeys(["loss", task.measure])
    return [lambda axes, metric=m: _draw_ranks(axes, found, task, metric) for m in metrics]


def _draw_ranks(axes: Any, found: Sequence[Row], task: Task, metric: str) -> None:
    unit = 100 if metric == "accuracy" else 1
    for method in dict.fromkeys(row.cell.method for row in found):
        points = []
        for row in found:
            if row.cell.method == method and (values := list(row.values(metric).values())):
                mean, error = mean_and_error(values)
                points.append((row.cell.rank, unit * mean, unit * (error or 0)))
        color, label = COLORS.get(method), VARIANTS[method].label
        if points and points[0][0] is None:
            axes.axhline(points[0][1], color=color, linestyle="--", linewidth=1, label=label)
        elif points:
            at, means, errors = zip(*points, strict=True)
            axes.errorbar(
                at, means, yerr=errors, fmt="o-", ms=4, capsize=3, color=color, label=label
            )
    ranks = sorted({row.cell.rank for row in found if row.cell.rank is not None})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    if ranks:
        axes.set_xlim(ranks[0] / 1.3, ranks[-1] * 1.3)
    axes.set(xlabel="rank", ylabel=AXES[metric])
    axes.set_title(f"{task.model}, {NAMES.get(task.name, task.name)}", fontsize=9)
