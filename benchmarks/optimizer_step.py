"""Compile time, step time and state of the optimizer alone, over SmolLM2-135M's 150 pairs.

    python benchmarks/optimizer_step.py --rank 8

Q, K, V, Up and Down of 30 layers, as 150 separate pairs and as 5 stacks of 30 (scanned layers),
with `loft_adamw` and `loft_muon` beside `optax.adamw` on the same factors. All compiled
steps run in alternation in one process, after a warm-up; the medians are printed with the quartiles
and their ratio to `optax.adamw`. Times of one machine do not carry over: the ratios are the result.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import loft_jax

SHAPES = {"q": (576, 576), "k": (576, 192), "v": (576, 192), "up": (576, 1536), "down": (1536, 576)}
LAYERS = 30


def adapters(rank: int, stacked: bool) -> dict[str, Any]:
    """Trained-looking factors: both non-zero."""

    def pair(seed: int, m: int, n: int, batch: tuple[int, ...]) -> dict[str, jax.Array]:
        key_a, key_b = jax.random.split(jax.random.key(seed))
        return {
            "lora_a": jax.random.normal(key_a, (*batch, m, rank)) / m**0.5,
            "lora_b": jax.random.normal(key_b, (*batch, rank, n)) / 100,
        }

    if stacked:
        return {name: pair(0, *shape, (LAYERS,)) for name, shape in SHAPES.items()}
    return {
        f"layer_{i}": {name: pair(i, *shape, ()) for name, shape in SHAPES.items()}
        for i in range(LAYERS)
    }


def optimizers() -> dict[str, optax.GradientTransformation]:
    pairs = loft_jax.LoraPairs(axes=((".*layer_.*", loft_jax.LoraAxes()), (".*", STACKED)))
    return {
        "optax.adamw": optax.adamw(1e-3),
        "loft_adamw, calibrated": loft_jax.loft_adamw(1e-3, pairs=pairs),
        "loft_adamw, factored": loft_jax.loft_adamw(1e-3, second_moment="factored", pairs=pairs),
        "loft_adamw, diagonal": loft_jax.loft_adamw(1e-3, second_moment="diagonal", pairs=pairs),
        "loft_muon": loft_jax.loft_muon(1e-3, pairs=pairs),
    }


STACKED = loft_jax.LoraAxes(batch=(0,))


class Step:
    """A compiled optimizer step with its state, and the times it took."""

    def __init__(self, tx: optax.GradientTransformation, params: Any):
        self.params, self.grads = params, jax.tree.map(lambda x: x / 10 + 0.01, params)
        self.state = jax.jit(tx.init)(params)

        def step(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        began = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=(1, 2)).lower(self.grads, self.state, params)
        traced = time.perf_counter()
        self.run = lowered.compile()
        self.trace, self.compile = traced - began, time.perf_counter() - traced
        self.params = jax.tree.map(jnp.copy, params)
        self.bytes = sum(x.nbytes for x in jax.tree.leaves(self.state))
        analysis = self.run.memory_analysis()
        self.temporary = analysis.temp_size_in_bytes if analysis else 0
        self.times: list[float] = []

    def once(self) -> None:
        began = time.perf_counter()
        self.params, self.state = jax.block_until_ready(
            self.run(self.grads, self.state, self.params)
        )
        self.times.append(time.perf_counter() - began)


def measure(rank: int, stacked: bool, runs: int) -> list[dict[str, Any]]:
    params = adapters(rank, stacked)
    steps = {name: Step(tx, params) for name, tx in optimizers().items()}
    for _ in range(3 + runs):
        for step in steps.values():
            step.once()
    plain = np.array(steps["optax.adamw"].times[3:])
    rows = []
    for name, step in steps.items():
        times = np.array(step.times[3:])
        quartiles = np.quantile(times, (0.25, 0.5, 0.75)) * 1e3
        rows.append(
            {
                "optimizer": name,
                "layout": "5 stacks of 30" if stacked else "150 pairs",
                "rank": rank,
                "trace_s": round(step.trace, 2),
                "compile_s": round(step.compile, 2),
                "step_ms": [round(float(x), 1) for x in quartiles],
                "ratio": round(float(np.median(times) / np.median(plain)), 1),
                "state_mb": round(step.bytes / 1e6, 1),
                "temporary_mb": round(step.temporary / 1e6, 1),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--results", type=Path, help="append the rows to this JSON-lines file")
    options = parser.parse_args()
    rows = [
        row
        for stacked in (False, True)
        for row in measure(options.rank, stacked, max(1, options.runs))
    ]
    print(
        "| optimizer | layout | trace + compile (s) | step (ms, quartiles) | ratio | state | temp |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        low, median, high = row["step_ms"]
        print(
            f"| {row['optimizer']} | {row['layout']} | {row['trace_s']} + {row['compile_s']} | "
            f"{median} ({low} to {high}) | {row['ratio']} | {row['state_mb']} MB | "
            f"{row['temporary_mb']} MB |"
        )
    if options.results:
        where = {"jax": jax.__version__, "machine": f"{platform.machine()}, {jax.devices()[0]}"}
        with options.results.open("a") as file:
            file.writelines(json.dumps(row | where) + "\n" for row in rows)


if __name__ == "__main__":
    main()
