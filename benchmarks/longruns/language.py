"""Fine-tunes a byte-level transformer from prose to Python, for long enough that the rank binds.

    python -m benchmarks.longruns language --text wikitext2-train.txt.gz --method full --rate 3e-3

The model is first trained on the bytes of a text, once; --cache keeps it. Then it is fine-tuned on
the sources of Python's standard library, all of its kernels or adapters on all of them. Files are
held out for the validation and the test loss, in nats a byte. A run that the results have already
is skipped. `suite` runs all that docs/longruns.md reports.
"""

import argparse
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import records
from benchmarks.longruns.data import Texts, held_out, python_sources, read_text
from benchmarks.longruns.methods import METHODS
from benchmarks.longruns.training import PRETRAINING_STEPS, Sizes, fine_tune, mean_loss, pretrain

RESULTS = Path(__file__).parent / "results" / "language.jsonl"


class Run(NamedTuple):
    """What distinguishes a run from others of the same sizes."""

    method: str
    rank: int | None
    """None where all kernels are trained."""
    rate: float
    seed: int


class Bench:
    """The pretrained model, the texts and the results so far."""

    def __init__(self, options: argparse.Namespace):
        self.sizes = Sizes(**{name: getattr(options, name) for name in Sizes._fields})
        self.texts: Texts = python_sources()
        read = functools.partial(read_text, options.text)
        self.pretrained = pretrain(read, options.cache, self.sizes, options.pretraining_steps)
        test = held_out(self.texts.test, self.sizes.batch, self.sizes.length)
        before = mean_loss(self.pretrained, None, test)
        print(f"test loss before fine-tuning: {before:.4f}", flush=True)
        self.file = options.results
        self.rows = rows_of(self.file, self.sizes)

    def result(self, run: Run) -> records.Row:
        """The row of a run, from the results or from the run itself."""
        if run in self.rows:
            return self.rows[run]
        found = fine_tune(
            self.pretrained, self.texts, run.method, run.rank or 1, run.rate, run.seed, self.sizes
        )
        row = run._asdict() | self.sizes._asdict() | found
        records.append(self.file, [row])
        print(*run, found["loss"], f"{1000 * (found['seconds'] or 0):.0f} ms", flush=True)
        self.rows[run] = row
        return row


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Adds the text, the sizes, the cache and the results."""
    parser.add_argument("--text", type=Path, required=True, help="to train on first, maybe gzipped")
    helps = ("of fine-tuning", "of the model", "of the model", "bytes a sequence", "sequences")
    for (name, value), text in zip(Sizes()._asdict().items(), helps, strict=True):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default {value})")
    parser.add_argument("--pretraining-steps", type=int, default=PRETRAINING_STEPS)
    parser.add_argument("--cache", type=Path, default=Path("longruns-pretrained.npz"))
    parser.add_argument("--results", type=Path, default=RESULTS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", choices=METHODS, nargs="+", required=True, metavar="METHOD")
    parser.add_argument("--rate", type=float, nargs="+", required=True, help="peak learning rates")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    add_sizes(parser)


def run(options: argparse.Namespace) -> None:
    bench = Bench(options)
    for seed, method, rate in itertools.product(options.seed, options.method, options.rate):
        rank = None if METHODS[method].full else options.rank
        bench.result(Run(method, rank, rate, seed))


def rows_of(file: Path, sizes: Sizes) -> dict[Run, records.Row]:
    """The rows of a results file that have these sizes."""
    rows: Sequence[dict[str, Any]] = records.read(file) if file.exists() else []
    of_sizes = [row for row in rows if all(row[k] == v for k, v in sizes._asdict().items())]
    return {Run(*(row[name] for name in Run._fields)): row for row in of_sizes}
