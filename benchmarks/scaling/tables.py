"""Prints the tables of docs/scaling.md from the results: compiled and predicted.

python -m benchmarks.scaling tables
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks import markdown
from benchmarks.records import Row, read
from benchmarks.scaling import formulas
from benchmarks.scaling.settings import (
    compiled,
    describe,
    from_row,
    in_chunks,
    key_of,
    share_of_hbm,
    to_row,
)
from benchmarks.scaling.step import Setting

RESULTS = Path(__file__).parent / "results" / "compile.jsonl"
NAMES = ("model", "devices", "mesh", "method")
MIB, GIB = 2**20, 2**30


def results(settings: Sequence[Setting]) -> list[Row]:
    """The latest row of each setting, in their order."""
    latest = {key_of(row): row for row in read(RESULTS)}
    keys = [key_of(to_row(setting)) for setting in settings]
    return [latest[key] for key in keys if key in latest]


def tables(rows: list[Row]) -> str:
    """The table of memory and that of communication; cells are compiled / predicted."""
    heads = [*NAMES, "arguments", "temporaries", "total", "error", "of HBM"]
    memory = markdown.table(heads, map(_memory, rows))
    heads = [*NAMES, "model sends", "optimizer sends", "its collectives"]
    with_text = [row for row in rows if row["sent_by_model"] is not None]
    return f"{memory}\n\n{markdown.table(heads, map(_traffic, with_text))}"


def _memory(row: Row) -> list[object]:
    guess = formulas.memory(from_row(row))
    total = row["arguments"] + row["temporaries"]
    return [
        *describe(row),
        _both(row["arguments"], guess.arguments, GIB, 2),
        _both(row["temporaries"], guess.temporaries, GIB, 2),
        _both(total, guess.total, GIB, 2),
        f"{guess.total / total - 1:+.1%}",
        share_of_hbm(row["target"], total),
    ]


def _traffic(row: Row) -> list[object]:
    *of_model, loft = formulas.traffic(from_row(row))
    return [
        *describe(row),
        _both(row["sent_by_model"], sum(of_model), GIB, 2),
        _both(row["sent_by_optimizer"], loft, MIB, 1),
        ", ".join(row["optimizer_kinds"]),
    ]


def _both(compiled: float, predicted: float, unit: int, digits: int) -> str:
    return f"{compiled / unit:.{digits}f} / {predicted / unit:.{digits}f}"


def run(options: argparse.Namespace) -> None:
    del options
    print(f"{tables(results(compiled()))}\n\n{tables(results(in_chunks()))}")
