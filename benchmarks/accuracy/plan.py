"""Which runs an experiment needs, and which of them it can make now."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from accuracy.config import BUDGET, BUDGET_NEARBY, Cell, Experiment, Runs, Task
from accuracy.search import Search, place_of, rate_at, search
from accuracy.store import Key, Record, loss_of
from accuracy.variants import VARIANTS

Results = Mapping[Key, Record]

BASE_RANK = 4
"""The searches at other ranks start at the best rate of this one."""


class Choice(NamedTuple):
    """The learning rate that was found best for a cell."""

    rate: float | None
    """None where nothing is trained."""
    remark: str = ""
    """Why a better one may exist: "unfinished" while the search has not ended, "edge" where the
    best is the lowest or the highest that was tried."""


class Plan(NamedTuple):
    """What is missing of a cell."""

    now: list[Key]
    """Runs that can be made."""
    later: int
    """How many more there will be at most, once those are made."""


def first_losses(results: Results, cell: Cell, seed: int) -> dict[int, float]:
    """The validation losses of a cell by the place of the rate on the grid."""
    return {
        place_of(key.rate): loss_of(record)
        for key, record in results.items()
        if key.cell == cell and key.seed == seed and key.rate is not None
    }


def budget(cell: Cell) -> int:
    """How many learning rates a cell's search may try."""
    return BUDGET if cell.rank in (None, BASE_RANK) else BUDGET_NEARBY


def searched(results: Results, cell: Cell, task: Task, seed: int) -> Search:
    """The search for the cell's learning rate, as far as it has come."""
    start = place_of(VARIANTS[cell.method].rate * task.full_rate)
    if cell.rank not in (None, BASE_RANK):
        at_base = searched(results, cell._replace(rank=BASE_RANK), task, seed)
        if at_base.wanted is None and at_base.best is not None:
            start = at_base.best
    return search(first_losses(results, cell, seed), start, budget(cell))


def chosen(results: Results, cell: Cell, runs: Runs, task: Task) -> Choice | None:
    """The best rate of a cell, by the first seed's validation loss; None if it is not known yet."""
    if not VARIANTS[cell.method].trained:
        return Choice(None)
    if runs.rates is None:
        found = searched(results, cell, task, runs.seeds[0])
        if found.best is None:
            return None
        remark = "edge" if found.at_edge else ""
        return Choice(rate_at(found.best), "unfinished" if found.wanted is not None else remark)
    losses = first_losses(results, cell, runs.seeds[0])
    tried = [rate for rate in runs.rates if place_of(rate) in losses]
    if not tried:
        return None
    best = min(tried, key=lambda rate: (losses[place_of(rate)], rate))
    remark = "edge" if best in (min(tried), max(tried)) else ""
    return Choice(best, "unfinished" if len(tried) < len(runs.rates) else remark)


def plan(results: Results, cell: Cell, runs: Runs, task: Task) -> Plan:
    """What is missing of a cell; what a search wants next depends on what it has found."""
    if not VARIANTS[cell.method].trained:
        return _missing(results, [Key(cell, None, runs.seeds[0])])
    if runs.rates is not None:
        return _missing(results, [Key(cell, r, s) for s in runs.seeds for r in runs.rates])
    found = searched(results, cell, task, runs.seeds[0])
    if found.wanted is not None:
        later = budget(cell) - len(found.tried) - 1 + len(runs.seeds) - 1
        return Plan([Key(cell, rate_at(found.wanted), runs.seeds[0])], later)
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
    """The cells of an experiment, or those of some methods, tasks and ranks."""
    return [
        (runs, cell)
        for runs in experiment.runs
        for cell in runs.cells()
        if (methods is None or cell.method in methods)
        and (tasks is None or cell.task in tasks)
        and (ranks is None or cell.rank in ranks)
    ]
