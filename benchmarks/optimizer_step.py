"""The optimizer alone: time, compile time, state and temporaries of a step on a model's adapters.

    python benchmarks/optimizer_step.py --pairs gpt2 smollm2 --ranks 4 16

`loft_adamw` and `loft_muon` beside `optax.adamw` and `optax.contrib.muon` on the same factors, and
beside Algorithm 1 typed plainly in PyTorch (where PyTorch is installed). All run in alternation in
one process, two steps at a time, since LoFT moves one factor and then the other. The medians are
printed with the quartiles. Times of one machine do not carry over: the ratios are the result.
"""

import argparse
import gc
import importlib.util
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from pair_sets import PAIR_SETS, STACKED, PairSet, adapters, like
from timing import append, in_alternation, paired_ratio, quartiles

from loft_jax import LoraPairs, loft_adamw, loft_muon

Make = Callable[[float, LoraPairs], optax.GradientTransformation]
OPTIMIZERS: dict[str, Make] = {
    "optax.adamw": lambda rate, pairs: optax.adamw(rate),
    "optax.contrib.muon": lambda rate, pairs: optax.contrib.muon(
        rate, muon_weight_dimension_numbers=last_two
    ),
    "calibrated": lambda rate, pairs: loft_adamw(rate, pairs=pairs),
    "factored": lambda rate, pairs: loft_adamw(rate, second_moment="factored", pairs=pairs),
    "simple": lambda rate, pairs: loft_adamw(rate, second_moment="diagonal", pairs=pairs),
    "loft_muon": lambda rate, pairs: loft_muon(rate, pairs=pairs),
}
TORCH = "PyTorch, plain"
# Cross terms take r (r + 1) / 2 numbers a row, PyTorch's r^2: over this they are left out.
MOST_STATE = 6e9


def last_two(params: Any) -> Any:
    """Where Muon finds matrices in stacked layers."""
    axes = lambda x: optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1)
    return jax.tree.map(axes, params)


class Step:
    """A compiled optimizer step with its state."""

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
    """The same of PyTorch."""

    def __init__(self, params: Any):
        import torch
        from torch_loft import TorchLoft, tall_pairs

        torch.set_num_threads(os.cpu_count() or 1)
        self.grads = tall_pairs(like(params))
        self.tx = TorchLoft(tall_pairs(params), 1e-3)
        state = sum(
            x.nbytes
            for sides in self.tx.sides
            for side in sides
            for x in (side.before, side.first, side.cross)
        )
        self.costs = {"state_mb": round(state / 1e6, 2)}

    def __call__(self) -> None:
        for _ in range(2):
            self.tx.step(self.grads)


def measure(
    name: str, rank: int, runs: int, chosen: list[str], stacked: bool = False
) -> list[dict[str, Any]]:
    """Rows of all chosen optimizers on one set of pairs at one rank."""
    pair_set, steps = PAIR_SETS[name], {}
    params, apart = adapters(pair_set, rank, stacked), adapters(pair_set, rank)
    pairs = STACKED if stacked else LoraPairs()
    for optimizer in chosen:
        if optimizer == TORCH:
            if importlib.util.find_spec("torch") and fits(pair_set, rank, rank * rank):
                steps[optimizer] = TorchStep(apart)
        elif optimizer != "calibrated" or fits(pair_set, rank, rank * (rank + 1) // 2):
            steps[optimizer] = Step(OPTIMIZERS[optimizer](1e-3, pairs), params)
    times = in_alternation(steps, runs)
    base = times[next(iter(times))]
    rows = [
        {
            "pairs": f"{name}, stacked" if stacked else name,
            "rank": rank,
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
    """Whether the state of ``width`` numbers a row, and a copy on its way, are worth a trial."""
    return 2 * 4 * pair_set.rows * (width + 2 * rank) < MOST_STATE


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| pairs | rank | optimizer | step, ms (quartiles) | to the first | "
        "trace + compile, s | state, MB | temporaries, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, median, high = row["step_ms"]
        shown = lambda key, row=row: row.get(key) if row.get(key) is not None else ""
        compiled = f"{row['trace_s']} + {row['compile_s']}" if "trace_s" in row else ""
        lines.append(
            f"| {row['pairs']} | {row['rank']} | {row['optimizer']} | "
            f"{median:.1f} ({low:.1f} to {high:.1f}) | {row['ratio'][1]:.2f} | {compiled} | "
            f"{shown('state_mb')} | {shown('temporary_mb')} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", nargs="+", choices=PAIR_SETS, default=["smollm2"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[4])
    parser.add_argument("--stacked", action="store_true", help="layers stacked on a first axis")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--optimizers", nargs="+", choices=[*OPTIMIZERS, TORCH])
    parser.add_argument("--results", type=Path, help="append the rows to this JSON-lines file")
    options = parser.parse_args()
    rows = []
    for name in options.pairs:
        for rank in options.ranks:
            chosen = options.optimizers or [*OPTIMIZERS, TORCH]
            of_rank = measure(name, rank, options.runs, chosen, options.stacked)
            append(options.results, of_rank)
            rows += of_rank
    print(table(rows))


if __name__ == "__main__":
    main()
