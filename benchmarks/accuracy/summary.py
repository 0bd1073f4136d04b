"""Statistics of an experiment: means, standard errors and paired tests over seeds."""

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from benchmarks.accuracy.config import Cell, Experiment, Runs, Task
from benchmarks.accuracy.plan import Results, chosen
from benchmarks.accuracy.variants import VARIANTS

LEAST_SEEDS = 3
"""The smallest number of seeds for a paired test."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A cell at its best learning rate."""

    cell: Cell
    rate: float | None
    remark: str
    """As in `Choice`."""
    by_seed: Mapping[int, Mapping[str, Any]]
    """The results by seed."""

    @property
    def label(self) -> str:
        """The name of the method in tables and figures."""
        return VARIANTS[self.cell.method].label

    def values(self, metric: str) -> dict[int, float]:
        """The test metric by seed, without diverged runs."""
        tests = {seed: record["test"] for seed, record in self.by_seed.items()}
        return {seed: test[metric] for seed, test in tests.items() if test and metric in test}

    def median(self, name: str) -> float | None:
        """The median over seeds of a field of the results."""
        found = [record[name] for record in self.by_seed.values() if record.get(name) is not None]
        return float(np.median(found)) if found else None


def rows(results: Results, experiment: Experiment, task: Task) -> list[Row]:
    """A row for each cell with results, by rank, then in the order of the experiment."""
    found = {}
    for runs in experiment.runs:
        if runs.task == task.name:
            for cell in runs.cells():
                if cell not in found and (row := _row(results, cell, runs, task)):
                    found[cell] = row
    # Cells without a rank come first.
    return sorted(found.values(), key=lambda row: row.cell.rank or 0)


def _row(results: Results, cell: Cell, runs: Runs, task: Task) -> Row | None:
    choice = chosen(results, cell, runs, task)
    if choice is None:
        return None
    by_seed = {
        key.seed: record
        for key, record in results.items()
        if key.cell == cell and key.rate == choice.rate and key.seed in runs.seeds
    }
    if not by_seed:
        return None
    return Row(cell=cell, rate=choice.rate, remark=choice.remark, by_seed=by_seed)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; None for the error of a single value.

    Example:
      >>> mean_and_error([1.0, 2.0, 3.0])
      (2.0, 0.5773502691896258)
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None
    return mean, float(np.std(values, ddof=1)) / math.sqrt(len(values))


def paired(row: Row, base: Row | None, metric: str) -> tuple[float, float | None] | None:
    """The mean difference to another row over their common seeds, and its p value.

    The test is a two-sided paired t-test without correction for multiple comparisons. p is None
    with fewer than three seeds, or if all differences are equal.
    """
    if base is None or base.cell == row.cell:
        return None
    ours, theirs = row.values(metric), base.values(metric)
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    first, second = (np.array([x[seed] for seed in seeds]) for x in (ours, theirs))
    difference = first - second
    p = None
    if len(seeds) >= LEAST_SEEDS and np.ptp(difference) > 0:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of nearly equal differences
            p = float(np.asarray(scipy.stats.ttest_rel(first, second).pvalue))
    return float(difference.mean()), p


def base_of(found: Sequence[Row], row: Row, method: str) -> Row | None:
    """The row of a method that `row` is compared with: that of the same rank, or without a rank."""
    for other in found:
        if other.cell.method == method and other.cell.rank in (None, row.cell.rank):
            return other
    return None
