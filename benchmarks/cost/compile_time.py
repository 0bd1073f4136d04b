"""Measures how long a LLaMA-7B training step takes to compile with LoFT and with LoRA's AdamW.

    python -m benchmarks.cost compile-time --targets cpu h200:1 --layouts stacked separate

All seven projections of the 32 layers have adapters: 224 pairs, as 7 stacks if the model stacks its
layers, otherwise as 448 separate arrays. The benchmark traces and compiles the whole step (forward,
backward, clipping, update) for this CPU, or ahead of time for a device that need not be present, in
alternation with LoRA's. It allocates nothing. "instructions" counts those of the compiled program.
"""

import argparse
import time

import jax
import numpy as np

from benchmarks import markdown
from benchmarks.command_line import add_runs
from benchmarks.records import Row, append
from benchmarks.scaling.step import (
    MODELS,
    Setting,
    compile_lowered,
    lowered_step,
    without_accelerators,
)

ALL = ("q", "k", "v", "o", "gate", "up", "down")


def compile_once(setting: Setting) -> Row:
    """Seconds of tracing and of compiling, and the size of the program."""
    jax.clear_caches()
    began = time.perf_counter()
    lowered = lowered_step(setting)
    traced = time.perf_counter()
    compiled = compile_lowered(setting, lowered)
    done = time.perf_counter()
    return {
        "trace_s": traced - began,
        "compile_s": done - traced,
        "instructions": compiled.as_text().count(" = "),
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
    }


def measure(
    target: str,
    model: str,
    stacked: bool,
    rank: int,
    runs: int,
    methods: tuple[str, ...] = ("lora", "calibrated", "factored"),
) -> list[Row]:
    """Compiles all methods in alternation ``runs`` times; a row with medians for each."""
    setting = lambda method: Setting(
        target, model, {}, rank=rank, method=method, targets=ALL, stacked=stacked, chained=False
    )
    found: dict[str, list[Row]] = {method: [] for method in methods}
    for run in range(runs):
        for method in reversed(methods) if run % 2 else methods:
            found[method].append(compile_once(setting(method)))
    totals = {
        method: np.array([one["trace_s"] + one["compile_s"] for one in each])
        for method, each in found.items()
    }
    base = totals[methods[0]]
    median = lambda each, column: round(float(np.median([one[column] for one in each])), 2)
    return [
        {
            "target": target,
            "model": model,
            "layers": "stacked" if stacked else "separate",
            "rank": rank,
            "method": method,
            "trace_s": median(each, "trace_s"),
            "compile_s": median(each, "compile_s"),
            "total_s": [round(float(f(totals[method])), 2) for f in (np.min, np.median, np.max)],
            "ratio": round(float(np.median(totals[method] / base)), 3),
            "instructions": each[0]["instructions"],
            "temporaries_mib": round(each[0]["temporaries"] / 2**20, 1),
            "runs": runs,
        }
        for method, each in found.items()
    ]


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""

    def cells(row: Row) -> list[object]:
        low, median, high = row["total_s"]
        named = [row[x] for x in ("target", "layers", "method", "trace_s", "compile_s")]
        total = f"{median} ({low} to {high})"
        return [*named, total, f"{row['ratio']:.2f}", row["instructions"]]

    heads = ["compiled for", "layers", "method", "trace, s", "compile, s", "both, s (range)"]
    return markdown.table([*heads, "ratio to LoRA", "instructions"], map(cells, rows))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--targets", nargs="+", default=["cpu"], help='"cpu", "h200:1", "v5e:2x4" (default cpu)')
    add("--layouts", nargs="+", choices=("stacked", "separate"), default=["stacked"])
    add("--model", choices=MODELS, default="7b")
    add("--rank", type=int, default=16)
    add_runs(parser, 3)


def run(options: argparse.Namespace) -> None:
    without_accelerators()
    # Otherwise the benchmark would measure a cache of compiled programs.
    jax.config.update("jax_enable_compilation_cache", False)
    rows = []
    for target in options.targets:
        for layout in options.layouts:
            stacked = layout == "stacked"
            found = measure(target, options.model, stacked, options.rank, options.runs)
            append(options.results, found)
            rows += found
    print(table(rows))
