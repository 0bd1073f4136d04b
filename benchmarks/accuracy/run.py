"""Makes the missing runs of the study, of LoFT and its baselines.

    python -m benchmarks.accuracy run --experiment transfer --data FOLDER

experiments/ defines the experiments and tasks/ the protocol of each task. FOLDER holds the data:

    wikitext2-train.txt, wikitext2-valid.txt, wikitext2-test.txt   WikiText-2 (or .txt.gz)
    cifar10-train.npz, cifar10-test.npz     images, uint8 (count, 32, 32, 3), and labels
    arc-easy-train.json, arc-easy-test.json instruction, input, output, answer of each question

The pretrained models are downloaded once, as in the examples. Each run appends one line to
results/TASK.jsonl, and all experiments use it: no run is repeated. Ctrl-C loses the current run
only. `--list` prints the missing runs and the time that they will take.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from benchmarks.accuracy import config, provenance, store, training_runs, workloads
from benchmarks.accuracy.config import Cell, Task
from benchmarks.accuracy.plan import Results, cells, plan
from benchmarks.accuracy.variants import VARIANTS
from examples.common.errors import UserError

UNKNOWN = 120.0
"""Seconds that a run of a task without results is expected to take."""

OpenCell = Callable[[Task, Cell], training_runs.MakeRun]


def seconds_of(results: Results, cell: Cell) -> float:
    """The median time of runs of the same cell, or else method, or else task."""
    similar = (
        lambda other: other == cell,
        lambda other: other[:2] == cell[:2],
        lambda other: other.task == cell.task,
    )
    for is_similar in similar:
        if times := [record["seconds"] for key, record in results.items() if is_similar(key.cell)]:
            return statistics.median(times)
    return UNKNOWN


def make_missing(
    root: Path,
    chosen: Sequence[tuple[config.Runs, Cell]],
    open_cell: OpenCell,
    *,
    limit: float = float("inf"),
    most: float = float("inf"),
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Makes the missing runs, cell by cell; the runs of a cell share one compiled step.

    Args:
        root: the folder of results.
        chosen: the result of `cells`.
        open_cell: returns the function that makes the runs of a cell.
        limit: seconds; no run starts that is expected to end later.
        most: the largest number of runs to make.
        clock: returns seconds.

    Returns:
        The number of runs made.
    """
    began, made = clock(), 0
    tasks = {cell.task: config.read_task(cell.task) for _, cell in chosen}
    results: dict[store.Key, store.Record] = {}
    for task in tasks.values():
        results |= store.read(root, task)
    for runs, cell in chosen:
        make = None
        while missing := plan(results, cell, runs, tasks[cell.task]).now:
            if made >= most or clock() - began + seconds_of(results, cell) > limit:
                return made
            make = make or open_cell(tasks[cell.task], cell)
            key = missing[0]
            results[key] = make(key.rate, key.seed)
            store.append(root, key, results[key])
            made += 1
            print(describe(key, results[key]), flush=True)
    return made


def describe(key: store.Key, record: store.Record) -> str:
    """A line that describes a run."""
    rank = "" if key.cell.rank is None else f" r={key.cell.rank}"
    rate = "" if key.rate is None else f" lr={key.rate:g}"
    test = record["test"] or {"": "diverged"}
    metrics = ", ".join(f"{n} {x}" for n, x in test.items() if n != "examples")
    where = f"{key.cell.task} {key.cell.method}{rank}{rate} seed {key.seed}"
    return f"{where}: test {metrics} ({record['seconds']:.0f} s)"


def listed(results: Results, chosen: Sequence[tuple[config.Runs, Cell]]) -> list[str]:
    """Lines that describe the missing runs and the time that they will take."""
    lines, whole, seen = [], 0.0, set()
    for runs, cell in chosen:
        missing = plan(results, cell, runs, config.read_task(cell.task))
        keys = [key for key in missing.now if key not in seen]
        seen.update(keys)
        if keys:
            count = len(keys) + missing.later
            seconds = count * seconds_of(results, cell)
            whole += seconds
            rank = "" if cell.rank is None else f" r={cell.rank}"
            lines.append(
                f"{cell.task} {cell.method}{rank}: {count} runs, {seconds / 60:.0f} min; next "
                f"lr {', '.join(f'{k.rate or 0:g} (seed {k.seed})' for k in keys)}"
            )
    return [*lines, f"{whole / 3600:.1f} h in all"]


def opener(data: Path) -> OpenCell:
    """Opens cells of real tasks; data and model of the last task stay in memory."""
    kept: dict[str, workloads.Workload] = {}

    def open_cell(task: Task, cell: Cell) -> training_runs.MakeRun:
        # Frees the programs and arrays of the last cell.
        jax.clear_caches()
        gc.collect()
        if task.name not in kept:
            kept.clear()
            kept[task.name] = workloads.load(task, data)
        return training_runs.open_cell(task, kept[task.name], cell)

    return open_cell


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--experiment", nargs="+", choices=config.experiment_names(), help="default: all")
    add("--data", type=Path, help="folder with the data files")
    add("--methods", nargs="+", choices=list(VARIANTS), metavar="NAME", help="only these")
    add("--tasks", nargs="+", choices=config.task_names(), help="only these")
    add("--ranks", nargs="+", type=int, help="only these")
    add("--limit", type=float, default=float("inf"), help="minutes after which no run starts")
    add("--count", type=float, default=float("inf"), help="the largest number of runs to make")
    add("--list", action="store_true", help="print the missing runs and make none")
    add("--results", type=Path, default=config.RESULTS, help="folder with the results")


def run(options: argparse.Namespace) -> None:
    names = options.experiment or config.experiment_names()
    chosen = [
        pair
        for experiment in map(config.read_experiment, names)
        for pair in cells(experiment, options.methods, options.tasks, options.ranks)
    ]
    if options.list:
        print("\n".join(listed(store.read(options.results), chosen)))
        return
    if options.data is None:
        raise UserError("--data is missing: pass the folder with the data files (see --help).")
    provenance.commit()  # cached now, before the code in the folder can change
    made = make_missing(
        options.results,
        chosen,
        opener(options.data),
        limit=60 * options.limit,
        most=options.count,
    )
    print(f"{made} runs made")
