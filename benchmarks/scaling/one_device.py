"""Compiles LLaMA-7B's step for one H200 with every method, in the form of the paper's tables.

    python -m benchmarks.scaling one-device

Base in bfloat16, layers recomputed, the loss in chunks of tokens, 16 x 256 tokens, adapters on Q,
K, V, Up and Down. Nothing runs: the memory is the compiler's. Without --results the kept rows are
printed, beside what the paper reports for its own program (Tables 8, 9 and 11).
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import markdown
from benchmarks.records import Row, append, read
from benchmarks.scaling.step import Setting, compiled_step, without_accelerators

RESULTS = Path(__file__).parent / "results" / "one_device.jsonl"
LABELS = {
    "lora": "LoRA",
    "dora": "DoRA",
    "calibrated": "LoFT, calibrated",
    "calibrated-bfloat16": 'LoFT, calibrated, `nu_dtype="bfloat16"`',
    "factored": "LoFT, factored",
    "simple": "LoFT (simple)",
    "muon": "LoFT-Muon",
}
RANKS = (1, 4, 16, 64)
FACTORED_RANKS = (256,)
"""Ranks at which LoRA and the factored second moment alone are compiled."""
PAPER = {
    ("dora", 4): "+25.3 %",
    ("dora", 16): "+25.2 %",
    ("calibrated", 4): "+6.7 %",
    ("calibrated", 16): "+25.7 %",
    ("simple", 4): "+5.2 %",
    ("simple", 16): "+5.4 %",
}
"""Memory relative to LoRA of the same rank. DoRA is the paper's "DoRA (simple)"."""


def settings() -> list[tuple[str, int]]:
    """The methods and ranks, LoRA first."""
    found = [(method, rank) for rank in RANKS for method in LABELS]
    return found + [(method, rank) for rank in FACTORED_RANKS for method in ("lora", "factored")]


def measure(method: str, rank: int) -> Row:
    """Compiles one step."""
    began = time.perf_counter()
    setting = Setting("h200:1", "7b", {}, rank, method, chained=False, whole_logits=False)
    analysis = compiled_step(setting).memory_analysis()
    return {
        "method": method,
        "rank": rank,
        "arguments": analysis.argument_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "compile_s": round(time.perf_counter() - began, 1),
    }


def table(rows: Sequence[Row]) -> str:
    """The memory of each method, and relative to LoRA of the same rank."""
    total = {(x["method"], x["rank"]): x["arguments"] + x["temporaries"] for x in rows}
    ranks = sorted({rank for _, rank in total})

    def cell(method: str, rank: int) -> str:
        if (method, rank) not in total or ("lora", rank) not in total:
            return ""
        share = total[method, rank] / total["lora", rank] - 1
        relative = "" if method == "lora" else f" ({100 * share:+.1f} %)"
        paper = f"; paper {PAPER[method, rank]}" if (method, rank) in PAPER else ""
        return f"{total[method, rank] / 1e9:.2f}{relative}{paper}"

    body = [[label, *(cell(method, rank) for rank in ranks)] for method, label in LABELS.items()]
    return markdown.table(["GB", *(f"r = {rank}" for rank in ranks)], body)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, help="compile what this file lacks, and append it")


def run(options: argparse.Namespace) -> None:
    without_accelerators()
    path = options.results or RESULTS
    rows = read(path) if path.exists() else []
    done = {(row["method"], row["rank"]) for row in rows}
    for method, rank in settings() if options.results else []:
        if (method, rank) not in done:
            rows.append(measure(method, rank))
            append(path, rows[-1:])
            print(rows[-1], flush=True)
    print(table(rows))
