"""Runs the language runs of docs/longruns.md, and skips those that the results have.

    python -m benchmarks.longruns suite --text wikitext2-train.txt.gz

All of it, about 340 runs, takes about two hours of one idle core. It can be stopped at any time,
and --minutes starts no further run after so long. The learning rates of all methods are searched
first, then the other seeds follow one by one: what is there can be reported at any time.

Learning rates are half a decade apart. A search tries 0.01 (0.003 for full fine-tuning) and both
its neighbors with seed 0, and goes on outward while the best validation loss is at an edge. The
other seeds run at the best rate.
"""

import argparse
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence

from benchmarks import records
from benchmarks.accuracy.search import index_of, rate_at, search
from benchmarks.longruns.bench import Bench, Run, add_task
from benchmarks.longruns.methods import METHODS
from examples.common.errors import UserError

MOST_RATES = 6

Cell = tuple[str, int | None]
"""A method and a rank; full fine-tuning has none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A table of the report: methods at some ranks."""

    title: str
    methods: tuple[str, ...]
    ranks: tuple[int, ...] = (4,)


_RENEWAL = Part(
    title="Renewal",
    methods=(
        "full", "loft", "lora", "loft-anew-100", "loft-anew-250", "momentum-100",
        "random-100-small", "loft-anew-50", "loft-anew-500", "momentum-250", "momentum-500",
        "random-250-small", "lora-anew-100", "lora-anew-250", "lora-anew-500",
        "loft-anew-100-warm", "random-100", "momentum-100-small", "momentum-250-small",
    ),
)  # fmt: skip
_KEPT = Part(
    title="A part kept",
    methods=("kept-250-small", "random-250-small-kept", "kept-500-small", "random-500-small-kept"),
)
_RENEWAL_BY_RANK = Part(
    title="Renewal by rank", methods=("loft-anew-100", "loft-anew-500"), ranks=(1, 16)
)
_SIZES = Part(
    title="Other sizes",
    methods=("full", "loft", "lora", "loft-anew-500", "loft-dora", "loft-dora-anew-500"),
)
_BOUND = Part(title="Steps of low rank", methods=("full-rank-4", "full-rank-4-feedback"))
_CALIBRATION = Part(
    title="Calibration", methods=("loft", "loft-uncalibrated", "loft-calibrated", "loft-simple")
)
_RIVALS = Part(
    title="Other methods",
    methods=(
        "lora-rite", "lora-rite-no-escape", "altlora", "lora-muon", "loft-muon",
        "loft-simultaneous", "lora-pro",
    ),
)  # fmt: skip
_SHORT_RENEWAL = Part(
    title="Renewal",
    methods=("full", "loft", "lora", "loft-anew-250", "momentum-250", "loft-anew-100"),
)
_SHORT_RIVALS = Part(title="Other methods", methods=("rslora", "dora", "loft-dora", "lora-rite"))

PARTS = {
    "language": {
        "renewal": _RENEWAL,
        "kept": _KEPT,
        "renewal-by-rank": _RENEWAL_BY_RANK,
        "sizes": _SIZES,
        "bound": _BOUND,
        "calibration": _CALIBRATION,
        "ranks": Part(title="Ranks", methods=("loft", "lora"), ranks=(1, 4, 16)),
        "rivals": _RIVALS,
        "scaled": Part(
            title="rsLoRA and DoRA", methods=("rslora", "dora", "loft-dora"), ranks=(1, 4, 16)
        ),
        "dora-renewal": Part(
            title="Renewals of DoRA with LoFT", methods=("loft-dora-anew-250", "loft-dora-anew-500")
        ),
    },
    "arithmetic": {"renewal": _SHORT_RENEWAL, "rivals": _SHORT_RIVALS},
    "vision": {
        "renewal": _SHORT_RENEWAL,
        "calibration": dataclasses.replace(_CALIBRATION, methods=_CALIBRATION.methods[:3]),
        "rivals": _SHORT_RIVALS,
        "bound": dataclasses.replace(_BOUND, methods=("full-rank-4",)),
    },
    "cifar10": {"renewal": _SHORT_RENEWAL},
}
"""By task."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", nargs="+", metavar="PART", help="only these of the task's parts")
    parser.add_argument("--method", choices=METHODS, nargs="+", metavar="METHOD", help="only these")
    parser.add_argument("--ranks", type=int, nargs="+", help="only these, and full fine-tuning")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=math.inf)
    add_task(parser)


def run(options: argparse.Namespace) -> None:
    end = time.monotonic() + 60 * options.minutes
    parts = parts_of(options.task, options.part)
    bench = Bench(options)
    cells = [cell for part in parts for cell in cells_of(part)]
    if options.method:
        cells = [cell for cell in cells if cell[0] in options.method]
    if options.ranks:
        cells = [cell for cell in cells if cell[1] in (None, *options.ranks)]
    for next_run in runs(cells, options.seeds, bench.rows):
        if time.monotonic() > end:
            print("Time is up. The same command goes on.")
            return
        bench.result(next_run)


def parts_of(task: str, names: Sequence[str] | None) -> list[Part]:
    """The named parts of a task, or all."""
    of_task = PARTS[task]
    if unknown := [name for name in names or () if name not in of_task]:
        raise UserError(f"{task} has no --part {unknown[0]}: its parts are {', '.join(of_task)}.")
    return [of_task[name] for name in names or of_task]


def runs(cells: Sequence[Cell], seeds: int, rows: Mapping[Run, records.Row]) -> Iterator[Run]:
    """The runs to come, one after another; `rows` has to hold each when the next is asked for."""
    cells = list(dict.fromkeys(cells))
    for cell in cells:
        while (rate := next_rate(rows, *cell)) is not None:
            yield Run(*cell, rate, 0)
    for seed in range(1, seeds):
        for cell in cells:
            following = Run(*cell, best_rate(rows, *cell), seed)
            if following not in rows:
                yield following


def cells_of(part: Part) -> list[Cell]:
    """What a part compares."""
    return [
        (method, None if METHODS[method].full else rank)
        for method in part.methods
        for rank in part.ranks
    ]


def next_rate(rows: Mapping[Run, records.Row], method: str, rank: int | None) -> float | None:
    """The next rate of a search; None at its end."""
    losses = _losses(rows, method, rank)
    for trials in range(3, MOST_RATES + 1):
        found = search(losses, index_of(0.003 if METHODS[method].full else 0.01), trials)
        if found.next_index is not None:
            return rate_at(found.next_index)
        if not found.at_edge:
            return None
    return None


def best_rate(rows: Mapping[Run, records.Row], method: str, rank: int | None) -> float:
    """The rate with the lowest validation loss of seed 0."""
    losses = _losses(rows, method, rank)
    return rate_at(min(losses, key=lambda index: (losses[index], index)))


def _losses(rows: Mapping[Run, records.Row], method: str, rank: int | None) -> dict[int, float]:
    return {
        index_of(run.rate): math.inf if row["validation"] is None else row["validation"]
        for run, row in rows.items()
        if (run.method, run.rank, run.seed) == (method, rank, 0)
    }
