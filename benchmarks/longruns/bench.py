"""A task with its pretrained model and its results: each run is made once."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import records
from benchmarks.longruns.tasks import TASKS, Sizes, task
from benchmarks.longruns.training import PRETRAINING_RATE, fine_tune, mean, pretrain
from examples.common.errors import UserError

SIZES = {
    "steps": "of fine-tuning",
    "layers": "of the model",
    "width": "of the model",
    "length": "bytes of a sequence",
    "patch": "pixels of a patch's side",
    "batch": "sequences or images",
}


class Run(NamedTuple):
    """What distinguishes a run from others of the same sizes."""

    method: str
    rank: int | None
    """None where all kernels are trained."""
    rate: float
    seed: int


class Bench:
    """The pretrained model, the problem and the results so far."""

    def __init__(self, options: argparse.Namespace):
        module = task(options.task)
        self.sizes = sizes_of(options)
        self.problem = module.problem(options, self.sizes)
        cache = options.cache or Path(module.CACHE)
        steps = options.pretraining_steps or module.PRETRAINING_STEPS
        self.pretrained = pretrain(self.problem, cache, steps, options.pretraining_rate)
        before = mean(self.problem.loss, self.pretrained, None, self.problem.test)
        print(f"test loss before fine-tuning: {before:.4f} {module.UNIT}", flush=True)
        self.file = file_of(options)
        self.rows = rows_of(self.file, self.sizes)

    def result(self, run: Run) -> records.Row:
        """The row of a run, from the results or from the run itself."""
        if run in self.rows:
            return self.rows[run]
        found = fine_tune(
            self.pretrained, self.problem, run.method, run.rank or 1, run.rate, run.seed,
            self.sizes.steps,
        )  # fmt: skip
        row = run._asdict() | self.sizes._asdict() | found
        records.append(self.file, [row])
        print(*run, found["loss"], f"{1000 * (found['seconds'] or 0):.0f} ms", flush=True)
        self.rows[run] = row
        return row


def add_task(parser: argparse.ArgumentParser) -> None:
    """Adds the task, its data and sizes, the cache and the results."""
    add = parser.add_argument
    add("--task", choices=TASKS, default="language")
    add("--text", type=Path, help="to train a language model on first, maybe gzipped")
    add("--images", type=Path, help="folder with the data of vision or cifar10")
    add_sizes(parser)
    add("--pretraining-steps", type=int, help="the default depends on the task")
    add("--pretraining-rate", type=float, default=PRETRAINING_RATE, help="a smaller one if wider")
    add("--cache", type=Path, help="of the pretrained model; the default depends on the task")
    add("--results", type=Path, help="default: benchmarks/longruns/results/TASK.jsonl")


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Adds the sizes of the model and of a run."""
    for name, text in SIZES.items():
        parser.add_argument(f"--{name}", type=int, help=f"{text}; the default depends on the task")


def sizes_of(options: argparse.Namespace) -> Sizes:
    """The sizes of the task, with those that the options give."""
    of_task = task(options.task).Sizes
    given = {name: getattr(options, name) for name in SIZES if getattr(options, name) is not None}
    if unknown := sorted(given.keys() - set(of_task._fields)):
        raise UserError(f"The task {options.task} has no --{unknown[0]}: leave it out.")
    return of_task(**given)


def file_of(options: argparse.Namespace) -> Path:
    """The results file."""
    return options.results or Path(__file__).parent / "results" / f"{options.task}.jsonl"


def rows_of(file: Path, sizes: Sizes) -> dict[Run, records.Row]:
    """The rows of a results file that have these sizes."""
    rows: Sequence[dict[str, Any]] = records.read(file) if file.exists() else []
    of_sizes = [row for row in rows if all(row.get(k) == v for k, v in sizes._asdict().items())]
    return {Run(*(row[name] for name in Run._fields)): row for row in of_sizes}
