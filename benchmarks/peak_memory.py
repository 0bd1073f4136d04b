"""Peak resident memory of a process that trains SmolLM2-135M, one process a method.

    python benchmarks/peak_memory.py --ranks 4 16

The same steps as `training_step.py`: 4 x 128 tokens, adapters on Q, K, V, Up and Down. Resident
memory is the operating system's figure for the whole process: Python, the frozen weights in
float32, activations, state and temporaries. Memory that the allocator keeps after the model was
read counts too; it is the same for all methods.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from timing import append
from training_step import METHODS, batch_shape, make_steps

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.common.models import llama_weights as weights

CHOSEN = ("LoRA", "calibrated", "factored", "simple", "optax.contrib.muon")


def one(model: str | None, method: str, rank: int, shape: tuple[int, int]) -> dict[str, float]:
    """Trains four steps in this process; its peak and the optimizer's state, megabytes."""
    step = make_steps(weights.load(model), rank, shape, [method])[method]
    for _ in range(2):
        step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
    return {"peak_mb": round(peak / 1e6), "state_mb": step.state_mb}


def measure(
    model: str | None, method: str, rank: int, shape: tuple[int, int], runs: int
) -> dict[str, Any]:
    """The median peak of as many processes, and their range."""
    batch = "x".join(map(str, shape))
    command = [sys.executable, __file__, "--one", method, "--ranks", str(rank), "--batch", batch]
    if model is not None:
        command += ["--model", model]
    found = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(runs)
    ]
    peaks = sorted(one["peak_mb"] for one in found)
    return {
        "rank": rank,
        "batch": batch,
        "method": method,
        "peak_mb": [peaks[0], float(np.median(peaks)), peaks[-1]],
        "state_mb": found[0]["state_mb"],
        "runs": runs,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown, each peak beside the first method's of its rank."""
    lines = ["| rank | method | peak, MB (range) | to LoRA | state, MB |", "|---|---|---|---|---|"]
    for row in rows:
        low, median, high = row["peak_mb"]
        base = next(x["peak_mb"][1] for x in rows if x["rank"] == row["rank"])
        lines.append(
            f"| {row['rank']} | {row['method']} | {median:.0f} ({low} to {high}) | "
            f"{median / base - 1:+.1%} | {row['state_mb']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="a folder with config.json, safetensors and tokenizer")
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 16])
    parser.add_argument("--batch", type=batch_shape, default=(4, 128))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(CHOSEN))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--results", type=Path, help="append the rows to this JSON-lines file")
    parser.add_argument("--one", choices=METHODS, help="train in this process, print its peak")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.model, options.one, options.ranks[0], options.batch)))
        return
    rows = [
        measure(options.model, method, rank, options.batch, options.runs)
        for rank in options.ranks
        for method in options.methods
    ]
    append(options.results, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
