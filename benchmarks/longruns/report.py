"""Fills the tables of docs/longruns.md from the results.

    python -m benchmarks.longruns report

A table goes between the comments `table: TASK PART` and `end` of the page; `summary:` in place of
`table:` leaves out the losses by learning rate. Sizes other than the task's follow the part, as in
`table: language sizes steps=5000`. The rest of the page is not changed.
"""

import argparse
from pathlib import Path

from benchmarks import markdown
from benchmarks.longruns.bench import rows_of
from benchmarks.longruns.suite import PARTS, parts_of
from benchmarks.longruns.table import rates, table
from benchmarks.longruns.tasks import task
from examples.common.errors import UserError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "longruns.md"
RESULTS = Path(__file__).parent / "results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with the results")


def run(options: argparse.Namespace) -> None:
    page = options.page.read_text()
    options.page.write_text(markdown.fill(page, lambda mark: tables(mark, options.results)))
    print(options.page)


def tables(mark: str, results: Path) -> str:
    """The tables of a mark."""
    kind, _, of = mark.partition(": ")
    name, *rest = of.split()
    if kind not in ("table", "summary") or name not in PARTS or not rest:
        raise UserError(f"unknown mark {mark!r}: an example is 'table: language renewal'.")
    sizes = {key: int(value) for key, value in (word.split("=") for word in rest[1:])}
    rows = rows_of(results / f"{name}.jsonl", task(name).Sizes(**sizes))
    (part,) = parts_of(name, rest[:1])
    parts = [table(rows, part)] + ([rates(rows, part)] if kind == "table" else [])
    return "\n\n".join(parts)
