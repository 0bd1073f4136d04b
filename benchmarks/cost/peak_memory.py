"""Measures the peak resident memory of a process that trains SmolLM2-135M, one process per method.

    python -m benchmarks.cost peak-memory --ranks 4 16

The steps are those of `training-step`: 4 x 128 tokens, adapters on Q, K, V, Up and Down. Resident
memory is the operating system's figure for the whole process: Python, the frozen weights in
float32, activations, state and temporaries. It includes memory that the allocator keeps after the
model was loaded, which is the same for all methods.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks import markdown
from benchmarks.command_line import add_runs
from benchmarks.cost.training_step import METHODS, add_model, batch_shape, make_steps
from benchmarks.records import Row, append
from examples.common.models import llama_weights

ROOT = Path(__file__).resolve().parents[2]
CHOSEN = ("LoRA", "calibrated", "factored", "simple", "optax.contrib.muon")


def train(model: str | None, method: str, rank: int, shape: tuple[int, int]) -> Row:
    """Trains four steps in this process; returns its peak and the optimizer's state, in MB."""
    step = make_steps(llama_weights.load(model), rank, shape, [method])[method]
    for _ in range(2):
        step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
    return {"peak_mb": round(peak / 1e6), "state_mb": step.state_mb}


def measure(model: str | None, method: str, rank: int, shape: tuple[int, int], runs: int) -> Row:
    """The peaks of ``runs`` processes: lowest, median and highest."""
    batch = "x".join(map(str, shape))
    command = [sys.executable, "-m", "benchmarks.cost", "peak-memory", "--one", method]
    command += ["--ranks", str(rank), "--batch", batch]
    if model is not None:
        command += ["--model", str(Path(model).resolve())]
    call = lambda: subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    found = [json.loads(call().stdout) for _ in range(runs)]
    peaks = sorted(one["peak_mb"] for one in found)
    return {
        "rank": rank,
        "batch": batch,
        "method": method,
        "peak_mb": [peaks[0], float(np.median(peaks)), peaks[-1]],
        "state_mb": found[0]["state_mb"],
        "runs": runs,
    }


def table(rows: list[Row]) -> str:
    """The rows in Markdown, each peak relative to the first method's at its rank."""

    def cells(row: Row) -> list[object]:
        low, median, high = row["peak_mb"]
        base = next(x["peak_mb"][1] for x in rows if x["rank"] == row["rank"])
        peak, share = f"{median:.0f} ({low} to {high})", f"{median / base - 1:+.1%}"
        return [row["rank"], row["method"], peak, share, row["state_mb"]]

    heads = ["rank", "method", "peak, MB (range)", "relative to LoRA", "state, MB"]
    return markdown.table(heads, map(cells, rows))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add = parser.add_argument
    add("--ranks", nargs="+", type=int, default=[4, 16])
    add("--batch", type=batch_shape, default=(4, 128), metavar="ROWSxTOKENS")
    add("--methods", nargs="+", choices=METHODS, default=list(CHOSEN))
    add("--one", choices=METHODS, help="train in this process and print its peak as JSON")
    add_runs(parser, 3)


def run(options: argparse.Namespace) -> None:
    if options.one:
        print(json.dumps(train(options.model, options.one, options.ranks[0], options.batch)))
        return
    rows = [
        measure(options.model, method, rank, options.batch, options.runs)
        for rank in options.ranks
        for method in options.methods
    ]
    append(options.results, rows)
    print(table(rows))
