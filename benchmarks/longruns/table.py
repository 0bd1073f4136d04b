"""Prints the tables of the long runs from their results.

python -m benchmarks.longruns table
"""

import argparse
import statistics
from pathlib import Path

from benchmarks import markdown, records
from benchmarks.longruns.language import RESULTS
from benchmarks.longruns.methods import METHODS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=RESULTS)


def run(options: argparse.Namespace) -> None:
    rows = records.read(options.results)
    print(table(rows))


def table(rows: list[records.Row]) -> str:
    """A row a method: the best learning rate, its loss by seed, the gap closed, the time."""
    best = {}
    for method in METHODS:
        of_method = [row for row in rows if row["method"] == method]
        rates = sorted({row["rate"] for row in of_method})
        losses = {rate: [x["loss"] for x in of_method if x["rate"] == rate] for rate in rates}
        if losses:
            best[method] = min(losses.items(), key=lambda item: statistics.mean(item[1])), losses
    mean = lambda method: statistics.mean(best[method][0][1])
    lines = []
    for method, ((rate, losses), all_losses) in best.items():
        closed = "-"
        if {"full", "loft"} <= best.keys():
            gap = mean("loft") - mean("full")
            closed = f"{(mean('loft') - mean(method)) / gap:.0%}"
        spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
        seconds = statistics.median(x["seconds"] for x in rows if x["method"] == method)
        tried = ", ".join(f"{statistics.mean(x):.3f} ({r:g})" for r, x in all_losses.items())
        cells = [METHODS[method].label, f"{mean(method):.3f}{spread}", f"{rate:g}", closed]
        lines.append([*cells, f"{1000 * seconds:.0f}", tried])
    heads = ["method", "test loss", "rate", "gap closed", "ms a step", "all rates"]
    return markdown.table(heads, lines)
