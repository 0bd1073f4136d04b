"""How long a LLaMA-7B training step takes to compile with LoFT, beside LoRA's AdamW.

    python benchmarks/compile_time.py --targets cpu h200:1 --layouts stacked apart

All seven projections of 32 layers have adapters: 224 pairs, as 7 stacks where the model stacks its
layers, else as 448 arrays of their own. The whole step is traced and compiled (forward, backward,
clipping, update), for this CPU or ahead of time for a device that need not be there, in alternation
with LoRA's. Nothing is allocated. "instructions" are those of the compiled program.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before jax starts: the accelerators are only compiled for
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import numpy as np
from scaling_step import MODELS, Setting, compile_lowered, lowered_step
from timing import append

METHODS = ("lora", "calibrated", "factored")
ALL = ("q", "k", "v", "o", "gate", "up", "down")


def compile_once(setting: Setting) -> dict[str, Any]:
    """Seconds of tracing and of compiling, and the size of the program."""
    jax.clear_caches()
    began = time.perf_counter()
    lowered = lowered_step(setting)
    traced = time.perf_counter()
    compiled = compile_lowered(setting, lowered)
    done = time.perf_counter()
    text = compiled.as_text()
    return {
        "trace_s": traced - began,
        "compile_s": done - traced,
        "instructions": text.count(" = "),
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
    }


def measure(
    target: str, model: str, apart: bool, rank: int, runs: int, methods: tuple[str, ...] = METHODS
) -> list[dict[str, Any]]:
    """Rows of all methods, compiled in turn ``runs`` times: medians and the ranges."""
    setting = lambda method: Setting(
        target, model, {}, rank=rank, method=method, targets=ALL, apart=apart
    )
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    for run in range(runs):
        for method in reversed(methods) if run % 2 else methods:
            found[method].append(compile_once(setting(method)))
    seconds = {
        method: np.array([one["trace_s"] + one["compile_s"] for one in of_method])
        for method, of_method in found.items()
    }
    base = seconds[methods[0]]
    return [
        {
            "target": target,
            "model": model,
            "layers": "apart" if apart else "stacked",
            "rank": rank,
            "method": method,
            "trace_s": round(float(np.median([one["trace_s"] for one in of_method])), 2),
            "compile_s": round(float(np.median([one["compile_s"] for one in of_method])), 2),
            "total_s": [round(float(f(seconds[method])), 2) for f in (np.min, np.median, np.max)],
            "ratio": round(float(np.median(seconds[method] / base)), 3),
            "instructions": of_method[0]["instructions"],
            "temporaries_mib": round(of_method[0]["temporaries"] / 2**20, 1),
            "runs": runs,
        }
        for method, of_method in found.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| compiled for | layers | method | trace, s | compile, s | both, s (range) | to LoRA | "
        "instructions |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, median, high = row["total_s"]
        lines.append(
            f"| {row['target']} | {row['layers']} | {row['method']} | {row['trace_s']} | "
            f"{row['compile_s']} | {median} ({low} to {high}) | {row['ratio']:.2f} | "
            f"{row['instructions']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--targets", nargs="+", default=["cpu"], help='"cpu", "h200:1", "v5e:2x4"')
    parser.add_argument("--layouts", nargs="+", choices=("stacked", "apart"), default=["stacked"])
    parser.add_argument("--model", choices=MODELS, default="7b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--results", type=Path, help="append the rows to this JSON-lines file")
    options = parser.parse_args()
    # A cache of compiled programs would be measured instead.
    jax.config.update("jax_enable_compilation_cache", False)
    rows = []
    for target in options.targets:
        for layout in options.layouts:
            found = measure(target, options.model, layout == "apart", options.rank, options.runs)
            append(options.results, found)
            print(table(found), flush=True)
            rows += found
    print(table(rows))


if __name__ == "__main__":
    main()
