"""Makes the runs of an experiment that are missing: accuracy and loss of LoFT and its peers.

    python benchmarks/accuracy/run.py --experiment transfer --data FOLDER

An experiment is a file in experiments/, the protocol of a task one in tasks/. FOLDER holds their
data:

    wikitext2-train.txt, wikitext2-valid.txt, wikitext2-test.txt   WikiText-2 (.txt.gz will do)
    cifar10-train.npz, cifar10-test.npz     images, uint8 (count, 32, 32, 3), and labels
    arc-easy-train.json, arc-easy-test.json instruction, input, output, answer of each question

The pretrained models are downloaded once, as by the examples. Each run leaves one file in results/,
and a run that has its file is not made again, in whichever experiment it occurs: Ctrl-C loses the
current run only. `--list` says what is missing, and how long it took alike before. report.py makes
tables and figures of what there is.
"""

import argparse
import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from accuracy import config, provenance, store, training_runs, workloads
from accuracy.config import Cell, Experiment, Task
from accuracy.plan import Results, cells, plan
from accuracy.variants import VARIANTS

from examples.common.errors import UserError, exit_status

UNKNOWN = 120.0
"""Seconds of a run of a task of which there are no results."""

OpenCell = Callable[[Task, Cell], training_runs.MakeRun]


def seconds_of(results: Results, cell: Cell) -> float:
    """The median time of runs like these: of the cell, the method, or the task."""
    likes = (
        lambda other: other == cell,
        lambda other: other[:2] == cell[:2],
        lambda other: other.task == cell.task,
    )
    for like in likes:
        if times := [record["seconds"] for key, record in results.items() if like(key.cell)]:
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
    """Makes what is missing, cell by cell, each with one compiled step.

    Args:
        root: the folder of results.
        chosen: of `cells`.
        open_cell: makes what makes the runs of a cell.
        limit: seconds; no run is begun that would probably end after them.
        most: how many runs to make.
        clock: seconds.

    Returns:
        How many runs were made.
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
            print(told(key, results[key]), flush=True)
    return made


def told(key: store.Key, record: store.Record) -> str:
    """A line about a run."""
    rank = "" if key.cell.rank is None else f" r={key.cell.rank}"
    rate = "" if key.rate is None else f" lr={key.rate:g}"
    test = record["test"] or {"": "diverged"}
    metrics = ", ".join(f"{n} {x}" for n, x in test.items() if n != "examples")
    where = f"{key.cell.task} {key.cell.method}{rank}{rate} seed {key.seed}"
    return f"{where}: test {metrics} ({record['seconds']:.0f} s)"


def listed(results: Results, chosen: Sequence[tuple[config.Runs, Cell]]) -> list[str]:
    """What is missing, and how long it will take."""
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
    """Cells of real tasks; the data and the model of the last task are kept."""
    kept: dict[str, workloads.Workload] = {}

    def open_cell(task: Task, cell: Cell) -> training_runs.MakeRun:
        # The last cell's programs and arrays go first.
        jax.clear_caches()
        gc.collect()
        if task.name not in kept:
            kept.clear()
            kept[task.name] = workloads.load(task, data)
        return training_runs.open_cell(task, kept[task.name], cell)

    return open_cell


def work(options: argparse.Namespace) -> None:
    names = options.experiment or config.experiment_names()
    experiments: list[Experiment] = [config.read_experiment(name) for name in names]
    chosen = [
        pair
        for experiment in experiments
        for pair in cells(experiment, options.methods, options.tasks, options.ranks)
    ]
    if options.list:
        print("\n".join(listed(store.read(options.results), chosen)))
        return
    if options.data is None:
        raise UserError("--data is missing: the folder with the data files (see --help).")
    provenance.commit()  # of the code that is running, whatever becomes of the folder meanwhile
    made = make_missing(
        options.results,
        chosen,
        opener(options.data),
        limit=60 * options.limit,
        most=options.count,
    )
    print(f"{made} runs made")


def main(argv: Sequence[str] | None = None) -> int:
    formatter: Any = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--experiment", nargs="+", choices=config.experiment_names(), help="default all")
    add("--data", type=Path, help="folder with the data files")
    add("--methods", nargs="+", choices=list(VARIANTS), metavar="NAME", help="only these")
    add("--tasks", nargs="+", choices=config.task_names(), help="only these")
    add("--ranks", nargs="+", type=int, help="only these")
    add("--limit", type=float, default=float("inf"), help="minutes, after which no run is begun")
    add("--count", type=float, default=float("inf"), help="make so many runs at most")
    add("--list", action="store_true", help="say what is missing, and make nothing")
    add("--results", type=Path, default=config.RESULTS)
    options = parser.parse_args(argv)
    with contextlib.suppress(BrokenPipeError):
        return exit_status(lambda: work(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
