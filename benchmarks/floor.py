"""The least that a LoFT step must cost: FLOPs and bytes of each part, and how long they take.

    python benchmarks/floor.py --pairs gpt2 --ranks 4 16

For each part of the update its FLOPs and the fewest bytes that must move (everything read once
and written once, float32), summed over a model's pairs. Beside them the time that they take at the
rates of this machine's CPU, measured in the same process and in alternation with the step itself,
and at the published peaks of an H200 and a TPU v5e. A part's floor is the slower of its arithmetic
and its traffic; the parts' floors add up, since each needs the one before.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from optimizer_step import OPTIMIZERS, Step
from pair_sets import PAIR_SETS, STACKED, PairSet, adapters
from timing import append, in_alternation

from loft_jax import LoraPairs
from loft_jax._moments import TWO_PRODUCTS_FROM

WORD = 4


class Part(NamedTuple):
    """What a part of a step must do: FLOPs in products, bytes, square roots with a division."""

    name: str
    flops: float
    bytes: float
    ratios: float = 0.0


class Rates(NamedTuple):
    """What a machine does in a second."""

    name: str
    flops: float
    bytes: float
    ratios: float

    def seconds(self, part: Part) -> float:
        arithmetic = part.flops / self.flops + part.ratios / self.ratios
        return max(arithmetic, part.bytes / self.bytes)


# Published peaks. Ratios: a square root and a division an entry, four a clock of each SM's sixteen
# special-function units on the H200; on TPUs the vector unit's, which is not published: left out.
MACHINES = (
    Rates("H200, float32", 67e12, 4.8e12, 132 * 16 / 2 * 1.98e9),
    Rates("H200, TF32", 494e12, 4.8e12, 132 * 16 / 2 * 1.98e9),
    Rates("TPU v5e, bfloat16 in 6 passes", 197e12 / 6, 0.819e12, np.inf),
    Rates("TPU v5e, bfloat16 in 3 passes", 197e12 / 3, 0.819e12, np.inf),
)


def parts(pair_set: PairSet, rank: int, second_moment: str = "calibrated") -> list[Part]:
    """The parts of one step; of the two factors, half of each kind of step moves either."""
    r, rows, entries = rank, pair_set.rows, pair_set.entries
    square, thin = 2.0 * r * r * rows, float(WORD * r * rows)
    shared = [
        # Three Gram matrices and three products with r x r matrices; the factor in, its basis out.
        Part("bases", 6 * square, 2 * thin),
        # T = Q_before^T Q, and the moments and gradients carried by r x r matrices.
        Part("transport, first moment", 3 * square, 4 * thin),
    ]
    if second_moment == "factored":
        # h^T h, the column sums q S, Q^T diag Q of the moving side and mu times it.
        return [*shared, Part("second moment, update", 4 * square, 4 * thin)]
    t = r * (r + 1) // 2
    carry = 2.0 * t * t if r < TWO_PRODUCTS_FROM else 4.0 * r**3
    return [
        *shared,
        Part("cross terms", (carry + 3 * t) * rows, 2.0 * WORD * t * rows),
        Part(
            "reconstruction, projection",
            2.0 * (t + 2 * r) * entries,
            WORD * (t + 3 * r) * rows / 2,
            entries,
        ),
    ]


def cpu_probes() -> dict[str, tuple[Callable[[], Any], float]]:
    """Programs that each do one thing at the machine's best rate, with how much of it they do."""
    compiled = lambda fn, *args: jax.jit(fn).lower(*args).compile()
    square = jnp.ones((2048, 2048), jnp.float32)
    small = jnp.ones(2**17, jnp.float32)  # in the cache of either core
    large = jnp.ones(2**25, jnp.float32)
    product = compiled(jnp.matmul, square, square)
    add = compiled(lambda x: x + 1, large)

    def divide(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 64, lambda _, y: x / (jnp.sqrt(y) + 1e-8), x)

    ratio = compiled(divide, small)
    return {
        "product": (lambda: jax.block_until_ready(product(square, square)), 2.0 * 2048**3),
        "copy": (lambda: jax.block_until_ready(add(large)), 2.0 * large.nbytes),
        "ratio": (lambda: jax.block_until_ready(ratio(small)), 64.0 * small.size),
    }


def measure(name: str, rank: int, second_moment: str, stacked: bool, runs: int) -> dict[str, Any]:
    """The floor by this machine's rates beside the measured step."""
    probes, pairs = cpu_probes(), STACKED if stacked else LoraPairs()
    step = Step(OPTIMIZERS[second_moment](1e-3, pairs), adapters(PAIR_SETS[name], rank, stacked))
    runners: dict[str, Callable[[], Any]] = {key: run for key, (run, _) in probes.items()}
    times = in_alternation(runners | {"step": step}, runs)
    best = {key: amount / float(np.median(times[key])) for key, (_, amount) in probes.items()}
    rates = Rates("this CPU", best["product"], best["copy"], best["ratio"])
    found = parts(PAIR_SETS[name], rank, second_moment)
    floor = sum(rates.seconds(part) for part in found)
    measured = float(np.median(times["step"])) / 2
    return {
        "pairs": f"{name}, stacked" if stacked else name,
        "rank": rank,
        "second_moment": second_moment,
        "gflop_per_s": round(best["product"] / 1e9, 1),
        "gb_per_s": round(best["copy"] / 1e9, 1),
        "gratio_per_s": round(best["ratio"] / 1e9, 2),
        "floor_ms": round(floor * 1e3, 2),
        "step_ms": round(measured * 1e3, 2),
        "over_floor": round(measured / floor, 2),
        "runs": runs,
    } | {f"{part.name}, ms": round(rates.seconds(part) * 1e3, 2) for part in found}


def paper_table(name: str, rank: int) -> str:
    """FLOPs, bytes and floors of the parts by published peaks."""
    found = parts(PAIR_SETS[name], rank)
    lines = [
        f"{name}, r = {rank}: milliseconds of a step at least",
        "",
        "| part | GFLOP | MB | " + " | ".join(x.name for x in MACHINES) + " |",
        "|---|---|---|" + "---|" * len(MACHINES),
    ]
    for part in [*found, None]:
        of_part = found if part is None else [part]
        cells = [
            "all" if part is None else part.name,
            f"{sum(x.flops for x in of_part) / 1e9:.3g}",
            f"{sum(x.bytes for x in of_part) / 1e6:.4g}",
            *(f"{sum(map(x.seconds, of_part)) * 1e3:.3g}" for x in MACHINES),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", nargs="+", choices=PAIR_SETS, default=["gpt2"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 16])
    parser.add_argument("--second-moment", choices=("calibrated", "factored"), default="calibrated")
    parser.add_argument("--stacked", action="store_true", help="layers stacked on a first axis")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--paper", action="store_true", help="published peaks alone, no measuring")
    parser.add_argument("--results", type=Path, help="append the rows to this JSON-lines file")
    options = parser.parse_args()
    for name in options.pairs:
        for rank in options.ranks:
            print(paper_table(name, rank), end="\n\n")
    if options.paper:
        return
    how = (options.second_moment, options.stacked, options.runs)
    rows = [measure(name, rank, *how) for name in options.pairs for rank in options.ranks]
    append(options.results, rows)
    print("| pairs | rank | GFLOP/s | GB/s | G ratios/s | floor, ms | step, ms | step / floor |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['pairs']} | {row['rank']} | {row['gflop_per_s']} | {row['gb_per_s']} | "
            f"{row['gratio_per_s']} | {row['floor_ms']} | {row['step_ms']} | {row['over_floor']} |"
        )


if __name__ == "__main__":
    main()
