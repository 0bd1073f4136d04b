"""The runs that an experiment needs, and those among them that can start now."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from benchmarks.accuracy.config import BUDGET, BUDGET_NEARBY, Cell, Experiment, Runs, Task
from benchmarks.accuracy.search import Search, index_of, rate_at, search
from benchmarks.accuracy.store import Key, Record, loss_of
from benchmarks.accuracy.variants import VARIANTS

Results = Mapping[Key, Record]

BASE_RANK = 4
"""The searches at other ranks start at the best rate of this rank."""


class Choice(NamedTuple):
    """The best learning rate of a cell."""

    rate: float | None
    """None for a method without training."""
    remark: str = ""
    """Why a better one may exist: "unfinished" if the search has not ended, "edge" if the best is
    the lowest or the highest that was tried."""


class Plan(NamedTuple):
    """The missing runs of a cell."""

    now: list[Key]
    """Runs that can start."""
    later: int
    """The largest number of runs that will follow them."""


def first_losses(results: Results, cell: Cell, seed: int) -> dict[int, float]:
    """The validation losses of a cell by the grid index of the rate."""
    return {
        index_of(key.rate): loss_of(record)
        for key, record in results.items()
        if key.cell == cell and key.seed == seed and key.rate is not None
    }


def budget(cell: Cell) -> int:
    """The number of learning rates that the search of a cell may try."""
    return BUDGET if cell.rank in (None, BASE_RANK) else BUDGET_NEARBY


def searched(results: Results, cell: Cell, task: Task, seed: int) -> Search:
    """The state of the search for the cell's learning rate."""
    start = index_of(VARIANTS[cell.method].rate * task.full_rate)
    if cell.rank not in (None, BASE_RANK):
        at_base = searched(results, cell._replace(rank=BASE_RANK), task, seed)
        if at_base.next_index is None and at_base.best is not None:
            start = at_base.best
    return search(first_losses(results, cell, seed), start, budget(cell))


def chosen(results: Results, cell: Cell, runs: Runs, task: Task) -> Choice | None:
    """The best rate of a cell by the first seed's validation loss; None before the first run."""
    if not VARIANTS[cell.method].trained:
        return Choice(None)
    if runs.rates is None:
        found = searched(results, cell, task, runs.seeds[0])
        if found.best is None:
            return None
        remark = "edge" if found.at_edge else ""
        return Choice(rate_at(found.best), "unfinished" if found.next_index is not None else remark)
    losses = first_losses(results, cell, runs.seeds[0])
    tried = [rate for rate in runs.rates if index_of(rate) in losses]
    if not tried:
        return None
    best = min(tried, key=lambda rate: (losses[index_of(rate)], rate))
    remark = "edge" if best in (min(tried), max(tried)) else ""
    return Choice(best, "unfinished" if len(tried) < len(runs.rates) else remark)


def plan(results: Results, cell: Cell, runs: Runs, task: Task) -> Plan:
    """The missing runs of a cell; the next run of a search depends on the results so far."""
    if not VARIANTS[cell.method].trained:
        return _missing(results, [Key(cell, None, runs.seeds[0])])
    if runs.rates is not None:
        return _missing(results, [Key(cell, r, s) for s in runs.seeds for r in runs.rates])
    found = searched(results, cell, task, runs.seeds[0])
    if found.next_index is not None:
        later = budget(cell) - len(found.tried) - 1 + len(runs.seeds) - 1
        return Plan([Key(cell, rate_at(found.next_index), runs.seeds[0])], later)
    assert found.best is not None
    return _missing(results, [Key(cell, rate_at(found.best), seed) for seed in runs.seeds])


def _missing(results: Results, keys: Iterable[Key]) -> Plan:
    return Plan([key for key in keys if key not in results], 0)


def cells(
    experiment: Experiment,
    methods: Iterable[str] | None = None,
    tasks: Iterable[str] | None = None,
    ranks: Iterable[int | None] | None = None,
) -> list[tuple[Runs, Cell]]:
    """The cells of an experiment, optionally those of some methods, tasks and ranks."""
    return [
        (runs, cell)
        for runs in experiment.runs
        for cell in runs.cells()
        if (methods is None or cell.method in methods)
        and (tasks is None or cell.task in tasks)
        and (ranks is None or cell.rank in ranks)
    ]
