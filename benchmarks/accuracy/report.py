"""Writes the tables of docs/accuracy.md and draws its figures from the results.

    python -m benchmarks.accuracy report

A table goes between the comments `table: EXPERIMENT TASK` and `end` of the page, and a figure at
`figure: EXPERIMENT` into docs/images/accuracy_EXPERIMENT.png. The rest of the page is not changed.
Results may be incomplete.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

from benchmarks import markdown
from benchmarks.accuracy import config, figures, store, tables
from benchmarks.accuracy.plan import Results
from examples.common.errors import UserError

DOCS = Path(__file__).resolve().parents[2] / "docs"


def read_all(root: Path) -> Results:
    """The results of all tasks."""
    found = {}
    for name in config.task_names():
        found |= store.read(root, config.read_task(name))
    return found


def make_parts(results: Results) -> dict[str, str]:
    """All tables and references to figures, by their marks on the page."""
    found = {}
    for experiment in map(config.read_experiment, config.experiment_names()):
        name = experiment.name
        if experiment.figure:
            drawn = any(figures.panels(results, experiment, config.read_task))
            image = f"![{experiment.title}](images/accuracy_{name}.png)"
            found[f"figure: {name}"] = image if drawn else "No results yet."
        for task in map(config.read_task, experiment.tasks()):
            table = tables.best_rates(results, experiment, task)
            found[f"table: {name} {task.name}"] = table
            if experiment.figure == "rates":
                table = tables.by_rate(results, experiment, task)
                found[f"table: {name} {task.name} rates"] = table
    return found


def fill(page: str, parts: Mapping[str, str]) -> str:
    """The page with these parts between its marks."""

    def part(mark: str) -> str:
        if mark not in parts:
            raise UserError(f"unknown mark {mark!r}; choose from {', '.join(parts)}.")
        return parts[mark]

    return markdown.fill(page, part)


def draw_all(results: Results, images: Path) -> list[Path]:
    """Draws the figures that have results."""
    drawn = []
    for experiment in map(config.read_experiment, config.experiment_names()):
        if panels := figures.panels(results, experiment, config.read_task):
            drawn.append(images / f"accuracy_{experiment.name}.png")
            figures.draw(panels, drawn[-1])
    return drawn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--results", type=Path, default=config.RESULTS, help="folder with the results")
    add("--page", type=Path, default=DOCS / "accuracy.md", help="the page to fill")
    add("--images", type=Path, default=DOCS / "images", help="folder for the figures")


def run(options: argparse.Namespace) -> None:
    results = read_all(options.results)
    options.page.write_text(fill(options.page.read_text(), make_parts(results)))
    drawn = draw_all(results, options.images)
    print(f"{len(results)} results; {', '.join(str(path) for path in [options.page, *drawn])}")
