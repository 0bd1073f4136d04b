"""The settings of the study: tasks/*.toml define the tasks, experiments/*.toml the runs."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks.accuracy.variants import VARIANTS
from examples.common.errors import UserError

HERE = Path(__file__).parent
RESULTS = HERE / "results"

BUDGET = 5
"""The number of learning rates that a search tries for each method at rank 4."""

BUDGET_NEARBY = 3
"""The same at other ranks, where the search starts at the best rate of rank 4."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What all runs of a task share: everything except method, rank, learning rate and seed."""

    name: str
    kind: Literal["text", "images", "questions"]
    model: str
    measure: Literal["loss", "accuracy", "likelihood"]
    """The test metric that compares methods."""
    full_rate: float
    """The learning rate at which the search starts for full fine-tuning; others are multiples."""
    targets: tuple[str, ...]
    """The layers with an adapter, by the short names of the examples."""
    steps: int
    batch_size: int
    length: int
    """Tokens of a window or of a question, or pixels along an edge of an image."""
    max_norm: float
    train: str
    """A file in the data folder, like `test` and `validation`."""
    test: str
    validation: str | None = None
    """None: a tenth of the training examples is held out."""
    validation_examples: int
    test_examples: int
    head_rate: float | None = None
    """The peak learning rate of a new head for all methods; None: the model has a head."""

    def settings(self) -> dict[str, Any]:
        """The settings as JSON; a result records them."""
        values = dataclasses.asdict(self)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


class Cell(NamedTuple):
    """All runs that share a compiled training step."""

    task: str
    method: str
    rank: int | None
    """None for methods without a rank."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runs:
    """Runs of an experiment on one task."""

    task: str
    methods: tuple[str, ...]
    ranks: tuple[int, ...]
    seeds: tuple[int, ...]
    rates: tuple[float, ...] | None = None
    """None: the first seed searches for the best rate, which then gets the other seeds."""

    def cells(self) -> list[Cell]:
        """The cells, ordered by method, then by rank."""
        found = [
            Cell(self.task, method, rank if VARIANTS[method].ranked else None)
            for method in self.methods
            for rank in self.ranks
        ]
        return list(dict.fromkeys(found))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Runs, and how to present their results."""

    name: str
    title: str
    runs: tuple[Runs, ...]
    figure: Literal["rates", "ranks"] | None = None
    against: tuple[str, ...] = ("lora", "full")
    """The methods that the tables subtract."""
    paper_column: str | None = None
    paper: dict[tuple[str, int | None], str] = dataclasses.field(default_factory=dict)
    """The figures of the paper, by method and rank."""

    def tasks(self) -> list[str]:
        """The names of the tasks, in order."""
        return list(dict.fromkeys(runs.task for runs in self.runs))


def task_names() -> list[str]:
    """The names of all tasks."""
    return sorted(path.stem for path in (HERE / "tasks").glob("*.toml"))


def experiment_names() -> list[str]:
    """The names of all experiments."""
    return sorted(path.stem for path in (HERE / "experiments").glob("*.toml"))


def read_task(name: str) -> Task:
    """Reads tasks/NAME.toml."""
    values = _tuples(_read("tasks", name, task_names()))
    try:
        return Task(name=name, **values)
    except TypeError as error:
        raise UserError(f"tasks/{name}.toml: {error}") from error


def read_experiment(name: str) -> Experiment:
    """Reads experiments/NAME.toml."""
    values = _read("experiments", name, experiment_names())
    paper = values.pop("paper", {"column": None, "values": []})
    try:
        runs = tuple(Runs(**_tuples(table)) for table in values.pop("runs"))
        experiment = Experiment(
            name=name,
            runs=runs,
            paper_column=paper["column"],
            paper={(v[0], v[1] if len(v) == 3 else None): v[-1] for v in paper["values"]},
            **_tuples(values),
        )
    except (TypeError, KeyError) as error:
        raise UserError(f"experiments/{name}.toml: {error}") from error
    methods = [*(m for runs in experiment.runs for m in runs.methods)]
    methods += [*experiment.against, *(method for method, _ in experiment.paper)]
    _check_known(f"experiments/{name}.toml", methods, list(VARIANTS))
    _check_known(f"experiments/{name}.toml", experiment.tasks(), task_names())
    return experiment


def _read(folder: str, name: str, known: list[str]) -> dict[str, Any]:
    _check_known(folder, [name], known)
    return tomllib.loads((HERE / folder / f"{name}.toml").read_text())


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}


def _check_known(where: str, names: list[str], known: list[str]) -> None:
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{where}: unknown name {unknown[0]!r}; choose from {', '.join(known)}.")
