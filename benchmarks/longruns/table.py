"""Prints the tables of a task from its results.

python -m benchmarks.longruns table --task vision
"""

import argparse
import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from benchmarks import markdown, records
from benchmarks.longruns.bench import Run, add_sizes, file_of, rows_of, sizes_of
from benchmarks.longruns.methods import METHODS
from benchmarks.longruns.suite import Cell, Part, best_rate, cells_of, parts_of
from benchmarks.longruns.tasks import TASKS

HEADS = ["method", "rank", "rate", "test loss", "seeds", "minus LoFT's", "p", "gap closed", "ms"]
RATE_HEADS = ["method", "rank"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=TASKS, default="language")
    parser.add_argument("--part", nargs="+", metavar="PART", help="only these of the task's parts")
    parser.add_argument("--results", type=Path, help="the file, if it is not the task's own")
    add_sizes(parser)


def run(options: argparse.Namespace) -> None:
    rows = rows_of(file_of(options), sizes_of(options))
    for part in parts_of(options.task, options.part):
        if found_cells(rows, part):
            print(f"\n{part.title}\n\n{table(rows, part)}\n\n{rates(rows, part)}")


def table(rows: Mapping[Run, records.Row], part: Part) -> str:
    """A line a method and rank, at its best rate.

    The difference to LoFT of the same rank is the mean over common seeds; p is of the two-sided
    paired t-test, corrected by Holm's method for the number of tests in the table.
    """
    cells = found_cells(rows, part)
    losses = {cell: at_best(rows, cell) for cell in {*cells, ("full", None)}}
    has_accuracy = any("accuracy" in row for row in rows.values())
    tests = {}
    for cell in cells:
        ours, theirs = losses[cell], at_best(rows, ("loft", cell[1] or part.ranks[0]))
        seeds = sorted(ours.keys() & theirs.keys())
        if seeds and cell[0] != "loft":
            tests[cell] = paired([ours[k] for k in seeds], [theirs[k] for k in seeds])
    corrected = holm({cell: p for cell, (_, p) in tests.items() if p is not None})
    lines = []
    for cell in cells:
        method, rank = cell
        found = list(losses[cell].values())
        finite = [row["seconds"] for run, row in rows.items() if run[:2] == cell]
        seconds = [x for x in finite if x is not None]
        difference, p = f"{tests[cell][0]:+.3f}" if cell in tests else "", corrected.get(cell)
        lines.append([
            METHODS[method].label,
            rank,
            f"{best_rate(rows, *cell):g}",
            mean_and_deviation(found),
            len(found),
            difference,
            None if p is None else f"{p:.2g}",
            _gap_closed(losses, cell, at_best(rows, ("loft", cell[1] or part.ranks[0]))),
            f"{1000 * statistics.median(seconds):.1f}" if seconds else None,
            *([_mean_accuracy(rows, cell)] if has_accuracy else []),
        ])  # fmt: skip
    return markdown.table([*HEADS, *(["accuracy"] if has_accuracy else [])], lines)


def rates(rows: Mapping[Run, records.Row], part: Part) -> str:
    """Test losses of seed 0 by learning rate."""
    cells = found_cells(rows, part)
    found = {run: row["loss"] for run, row in rows.items() if run[:2] in cells and run.seed == 0}
    columns = sorted({run.rate for run in found})
    shown = lambda run: None if run not in found else f"{found[run] or math.inf:.3f}"
    lines = [
        [METHODS[method].label, rank, *(shown(Run(method, rank, rate, 0)) for rate in columns)]
        for method, rank in cells
    ]
    return markdown.table([*RATE_HEADS, *(f"{rate:g}" for rate in columns)], lines)


def found_cells(rows: Mapping[Run, records.Row], part: Part) -> list[Cell]:
    """The methods and ranks of a part that have results."""
    found = {run[:2] for run in rows}
    return [cell for cell in dict.fromkeys(cells_of(part)) if cell in found]


def paired(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float | None]:
    """The mean difference and its p; None with fewer than three seeds.

    Example:
      >>> mean, p = paired([1.0, 2.0, 3.5], [2.0, 3.0, 4.0])
      >>> round(mean, 3), round(p, 3)
      (-0.833, 0.038)
    """
    difference = np.subtract(ours, theirs)
    p = None
    if len(difference) >= 3 and np.ptp(difference) > 0:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of nearly equal differences
            p = float(np.asarray(scipy.stats.ttest_rel(ours, theirs).pvalue))
    return float(difference.mean()), p


def holm(p: Mapping[Any, float]) -> dict[Any, float]:
    """Holm's correction: the smallest p times the number of tests, the next times one less, ...

    Example:
      >>> holm({"x": 0.01, "y": 0.04, "z": 0.03})
      {'x': 0.03, 'z': 0.06, 'y': 0.06}
    """
    corrected, largest = {}, 0.0
    for k, key in enumerate(sorted(p, key=lambda key: p[key])):
        largest = max(largest, min(1.0, (len(p) - k) * p[key]))
        corrected[key] = largest
    return corrected


def mean_and_deviation(values: Sequence[float]) -> str:
    """Example:
    >>> mean_and_deviation([1.0, 2.0]), mean_and_deviation([1.0])
    ('1.500 ± 0.707', '1.000')
    """
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def at_best(rows: Mapping[Run, records.Row], cell: Cell) -> dict[int, float]:
    """Test losses by seed at the best rate of a method and rank."""
    losses = {seed: row["loss"] for seed, row in rows_at_best(rows, cell).items()}
    return {seed: math.inf if x is None else x for seed, x in losses.items()}


def rows_at_best(rows: Mapping[Run, records.Row], cell: Cell) -> dict[int, records.Row]:
    """The results by seed at the best rate of a method and rank."""
    if not any(run[:2] == cell for run in rows):
        return {}
    best = (*cell, best_rate(rows, *cell))
    of_cell = {run.seed: row for run, row in rows.items() if run[:3] == best}
    return dict(sorted(of_cell.items()))


def _mean_accuracy(rows: Mapping[Run, records.Row], cell: Cell) -> str | None:
    found = [row["accuracy"] for row in rows_at_best(rows, cell).values() if "accuracy" in row]
    return f"{statistics.mean(found):.1%}" if found else None


def _gap_closed(
    losses: Mapping[Cell, Mapping[int, float]], cell: Cell, loft: Mapping[int, float]
) -> str | None:
    """The part of the gap between LoFT and full fine-tuning, over the seeds that all three have."""
    full = losses[("full", None)]
    seeds = full.keys() & loft.keys() & losses[cell].keys()
    if not seeds or cell[0] in ("full", "loft"):
        return None
    closed = [loft[k] - losses[cell][k] for k in seeds]
    gap = [loft[k] - full[k] for k in seeds]
    return f"{statistics.mean(closed) / statistics.mean(gap):.0%}"
