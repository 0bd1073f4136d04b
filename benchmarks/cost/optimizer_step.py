"""Times the optimizer alone: step, compilation, state and temporaries on a model's adapters.

    python -m benchmarks.cost optimizer-step --pairs gpt2 smollm2 --ranks 4 16

The benchmark compares `loft_adamw` and `loft_muon` with `optax.adamw` and `optax.contrib.muon` on
the same factors, and with Algorithm 1 typed plainly in PyTorch if PyTorch is installed. All
optimizers run in alternation in one process, two steps per round, because LoFT updates one factor
and then the other. The table shows medians and quartiles. Quote the ratios: times depend on the
machine.

With the default rate a step changes the products by about a hundredth, as in training. With 1e-3 it
changes them by as much as they are: then all pairs are balanced at every step.
"""

import argparse
import gc
import importlib.util
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import markdown
from benchmarks.command_line import add_runs
from benchmarks.cost.optimizers import LOFT, Make, adamw, muon
from benchmarks.cost.pair_sets import PAIR_SETS, STACKED, PairSet, adapters, like
from benchmarks.cost.timing import in_alternation, paired_ratio, quartiles
from benchmarks.records import Row, append
from loft_jax import LoraPairs

OPTIMIZERS: dict[str, Make] = {"optax.adamw": adamw, "optax.contrib.muon": muon, **LOFT}
TORCH = "PyTorch, plain"
RATE = 1e-5
MAX_STATE = 6e9
"""Bytes. Cross terms take r (r + 1) / 2 numbers per row, PyTorch's r^2: larger ones are skipped."""


class Step:
    """A compiled optimizer step with its state; a call takes two steps."""

    def __init__(self, tx: optax.GradientTransformation, params: Any):
        self.grads = like(params)
        self.state = jax.jit(tx.init)(params)

        def step(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        began = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=(1, 2)).lower(self.grads, self.state, params)
        traced = time.perf_counter()
        self.compiled = lowered.compile()
        analysis = self.compiled.memory_analysis()
        self.costs = {
            "trace_s": round(traced - began, 2),
            "compile_s": round(time.perf_counter() - traced, 2),
            "state_mb": round(sum(x.nbytes for x in jax.tree.leaves(self.state)) / 1e6, 2),
            "temporary_mb": round(analysis.temp_size_in_bytes / 1e6, 2) if analysis else None,
        }
        self.params = jax.tree.map(jnp.copy, params)

    def __call__(self) -> None:
        for _ in range(2):
            self.params, self.state = self.compiled(self.grads, self.state, self.params)
        jax.block_until_ready(self.params)


class TorchStep:
    """The same for PyTorch."""

    def __init__(self, params: Any):
        import torch

        from benchmarks.cost.torch_loft import TorchLoft, tall_pairs

        torch.set_num_threads(os.cpu_count() or 1)
        self.grads = tall_pairs(like(params))
        self.tx = TorchLoft(tall_pairs(params), 1e-3)
        self.costs = {"state_mb": round(self.tx.state_bytes / 1e6, 2)}

    def __call__(self) -> None:
        for _ in range(2):
            self.tx.step(self.grads)


def measure(
    name: str, rank: int, runs: int, chosen: list[str], stacked: bool = False, rate: float = RATE
) -> list[Row]:
    """Measures the chosen optimizers on one set of pairs at one rank, a row for each."""
    pair_set, steps = PAIR_SETS[name], {}
    params, separate = adapters(pair_set, rank, stacked), adapters(pair_set, rank)
    pairs = STACKED if stacked else LoraPairs()
    for optimizer in chosen:
        if optimizer == TORCH:
            if importlib.util.find_spec("torch") and fits(pair_set, rank, rank * rank):
                steps[optimizer] = TorchStep(separate)
        elif optimizer != "calibrated" or fits(pair_set, rank, rank * (rank + 1) // 2):
            steps[optimizer] = Step(OPTIMIZERS[optimizer](rate, pairs), params)
    times = in_alternation(steps, runs)
    base = times[next(iter(times))]
    rows = [
        {
            "pairs": f"{name}, stacked" if stacked else name,
            "rank": rank,
            "rate": rate,
            "optimizer": optimizer,
            "step_ms": quartiles(times[optimizer] / 2),
            "ratio": paired_ratio(times[optimizer], base),
            "runs": runs,
        }
        | step.costs
        for optimizer, step in steps.items()
    ]
    steps.clear()
    gc.collect()
    return rows


def fits(pair_set: PairSet, rank: int, width: int) -> bool:
    """Whether two copies of a state with ``width`` numbers per row stay below `MAX_STATE`."""
    return 2 * 4 * pair_set.rows * (width + 2 * rank) < MAX_STATE


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""

    def cells(row: Row) -> list[object]:
        low, median, high = row["step_ms"]
        return [
            row["pairs"],
            row["rank"],
            row["optimizer"],
            f"{median:.1f} ({low:.1f} to {high:.1f})",
            f"{row['ratio'][1]:.2f}",
            f"{row['trace_s']} + {row['compile_s']}" if "trace_s" in row else None,
            row.get("state_mb"),
            row.get("temporary_mb"),
        ]

    heads = ["pairs", "rank", "optimizer", "step, ms (quartiles)", "ratio to the first"]
    heads += ["trace + compile, s", "state, MB", "temporaries, MB"]
    return markdown.table(heads, map(cells, rows))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--pairs", nargs="+", choices=PAIR_SETS, default=["smollm2"])
    add("--ranks", nargs="+", type=int, default=[4])
    add("--stacked", action="store_true", help="stack the layers on a first axis")
    add("--optimizers", nargs="+", choices=[*OPTIMIZERS, TORCH], default=[*OPTIMIZERS, TORCH])
    add("--rate", type=float, default=RATE, help="learning rate (default %(default)s)")
    add_runs(parser, 9)


def run(options: argparse.Namespace) -> None:
    rows = []
    for name in options.pairs:
        for rank in options.ranks:
            found = measure(
                name, rank, options.runs, options.optimizers, options.stacked, options.rate
            )
            append(options.results, found)
            rows += found
    print(table(rows))
