"""Computes the least that a LoFT step must cost, and compares it with the measured step.

    python -m benchmarks.cost floor --pairs gpt2 --ranks 4 16

For each part of the update, the benchmark counts FLOPs and the fewest bytes that must move (all
arrays read once and written once, float32), summed over a model's pairs. It converts them to times
with the rates of this CPU, measured in alternation with the step itself, and with the published
peaks of an H200 and a TPU v5e. The floor of a part is the longer of its arithmetic and its traffic.
The floors of the parts add up, because each part needs the result of the one before.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import markdown
from benchmarks.command_line import add_runs
from benchmarks.cost.optimizer_step import OPTIMIZERS, Step
from benchmarks.cost.pair_sets import PAIR_SETS, STACKED, PairSet, adapters
from benchmarks.cost.timing import in_alternation
from benchmarks.records import Row, append
from loft_jax import LoraPairs

WORD = 4
"""Bytes of a float32."""
TWO_PRODUCTS_FROM = 32
"""From this rank on, LoFT calibrates cross terms by two products per row, not by one."""


class Part(NamedTuple):
    """What a part of a step must do: FLOPs of products, bytes, square roots with a division."""

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
        """The floor of a part."""
        arithmetic = part.flops / self.flops + part.ratios / self.ratios
        return max(arithmetic, part.bytes / self.bytes)


# Published peaks. An H200 computes four square roots or divisions per clock on each of the 16
# special-function units of an SM. The rate of a TPU's vector unit is not published and not counted.
MACHINES = (
    Rates("H200, float32", 67e12, 4.8e12, 132 * 16 / 2 * 1.98e9),
    Rates("H200, TF32", 494e12, 4.8e12, 132 * 16 / 2 * 1.98e9),
    Rates("TPU v5e, bfloat16 in 6 passes", 197e12 / 6, 0.819e12, np.inf),
    Rates("TPU v5e, bfloat16 in 3 passes", 197e12 / 3, 0.819e12, np.inf),
)


def parts(pair_set: PairSet, rank: int, second_moment: str = "calibrated") -> list[Part]:
    """The parts of one step, averaged over steps that update one factor and the other."""
    r, rows, entries = rank, pair_set.rows, pair_set.entries
    square, thin = 2.0 * r * r * rows, float(WORD * r * rows)
    shared = [
        # Three Gram matrices, three products with r x r matrices; the factor in, its basis out.
        Part("bases", 6 * square, 2 * thin),
        # T = Q_before^T Q, and the products of moments and gradients with r x r matrices.
        Part("calibration, first moment", 3 * square, 4 * thin),
    ]
    if second_moment == "factored":
        # h^T h, the column sums q S, Q^T diag Q of the active factor, and its product with mu.
        return [*shared, Part("second moment, update", 4 * square, 4 * thin)]
    t = r * (r + 1) // 2
    calibration = 2.0 * t * t if r < TWO_PRODUCTS_FROM else 4.0 * r**3
    return [
        *shared,
        Part("cross terms", (calibration + 3 * t) * rows, 2.0 * WORD * t * rows),
        Part(
            "reconstruction, projection",
            2.0 * (t + 2 * r) * entries,
            WORD * (t + 3 * r) * rows / 2,
            entries,
        ),
    ]


def cpu_probes() -> dict[str, tuple[Callable[[], Any], float]]:
    """Programs that run at one of the machine's peak rates, and the amount of work in each."""
    compiled = lambda fn, *args: jax.jit(fn).lower(*args).compile()
    square = jnp.ones((2048, 2048), jnp.float32)
    small = jnp.ones(2**17, jnp.float32)  # fits the cache of each core
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


def measure(name: str, rank: int, second_moment: str, stacked: bool, runs: int) -> Row:
    """The measured step and its floor at this machine's rates."""
    probes, pairs = cpu_probes(), STACKED if stacked else LoraPairs()
    step = Step(OPTIMIZERS[second_moment](1e-3, pairs), adapters(PAIR_SETS[name], rank, stacked))
    runners: dict[str, Callable[[], Any]] = {key: probe for key, (probe, _) in probes.items()}
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


def peaks_table(name: str, rank: int, second_moment: str) -> str:
    """FLOPs, bytes and floors of the parts at published peaks."""
    found = parts(PAIR_SETS[name], rank, second_moment)
    rows = [
        [
            label,
            f"{sum(x.flops for x in chosen) / 1e9:.3g}",
            f"{sum(x.bytes for x in chosen) / 1e6:.4g}",
            *(f"{sum(map(machine.seconds, chosen)) * 1e3:.3g}" for machine in MACHINES),
        ]
        for label, chosen in [*((part.name, [part]) for part in found), ("all", found)]
    ]
    title = f"{name}, r = {rank}, {second_moment}: least milliseconds of a step"
    heads = ["part", "GFLOP", "MB", *(machine.name for machine in MACHINES)]
    return f"{title}\n\n{markdown.table(heads, rows)}\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--pairs", nargs="+", choices=PAIR_SETS, default=["gpt2"])
    add("--ranks", nargs="+", type=int, default=[4, 16])
    add("--second-moment", choices=("calibrated", "factored"), default="calibrated")
    add("--stacked", action="store_true", help="stack the layers on a first axis")
    add("--peaks", action="store_true", help="print the floors at published peaks; do not measure")
    add_runs(parser, 9)


def run(options: argparse.Namespace) -> None:
    cases = [(name, rank) for name in options.pairs for rank in options.ranks]
    for case in cases:
        print(peaks_table(*case, options.second_moment))
    if options.peaks:
        return
    how = (options.second_moment, options.stacked, options.runs)
    rows = [measure(*case, *how) for case in cases]
    append(options.results, rows)
    shown = ("pairs", "rank", "gflop_per_s", "gb_per_s", "gratio_per_s")
    shown += ("floor_ms", "step_ms", "over_floor")
    heads = ["pairs", "rank", "GFLOP/s", "GB/s", "G ratios/s", "floor, ms", "step, ms"]
    print(markdown.table([*heads, "step / floor"], [[row[x] for x in shown] for row in rows]))
