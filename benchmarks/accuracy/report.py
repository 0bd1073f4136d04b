"""Draws every figure and writes every table of the study from its results.

    python benchmarks/accuracy/report.py

The tables go into docs/accuracy.md, each between the comments `table: EXPERIMENT TASK` and `end`,
and figures, at `figure: EXPERIMENT`, into docs/images/accuracy_EXPERIMENT.png; the rest of the page
is left alone. Results may be incomplete: what is missing is left out.
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from accuracy import config, figures, store, tables
from accuracy.plan import Results

from examples.common.errors import UserError, exit_status

DOCS = Path(__file__).resolve().parents[2] / "docs"
MARKED = re.compile(r"(<!-- ((?:table|figure): [\w ]+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)


def read_all(root: Path) -> Results:
    """The results of all tasks."""
    found = {}
    for name in config.task_names():
        found |= store.read(root, config.read_task(name))
    return found


def make_parts(results: Results) -> dict[str, str]:
    """Every table and every reference to a figure, by its mark on the page."""
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
    """The page with these parts in place of what is between its marks."""

    def part(match: re.Match[str]) -> str:
        if match[2] not in parts:
            raise UserError(f"there is no {match[2]!r}: there are {', '.join(parts)}")
        return f"{match[1]}\n{parts[match[2]]}\n\n{match[3]}"

    return MARKED.sub(part, page)


def draw_all(results: Results, images: Path) -> list[Path]:
    """Draws the figures for which there are results."""
    drawn = []
    for experiment in map(config.read_experiment, config.experiment_names()):
        if panels := figures.panels(results, experiment, config.read_task):
            drawn.append(images / f"accuracy_{experiment.name}.png")
            figures.draw(panels, drawn[-1])
    return drawn


def work(options: argparse.Namespace) -> None:
    results = read_all(options.results)
    options.page.write_text(fill(options.page.read_text(), make_parts(results)))
    drawn = draw_all(results, options.images)
    print(f"{len(results)} results; {', '.join(str(path) for path in [options.page, *drawn])}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=config.RESULTS)
    parser.add_argument("--page", type=Path, default=DOCS / "accuracy.md")
    parser.add_argument("--images", type=Path, default=DOCS / "images")
    options = parser.parse_args(argv)
    return exit_status(lambda: work(options))


if __name__ == "__main__":
    sys.exit(main())
