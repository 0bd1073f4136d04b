"""Measures how far a long run in float32 strays from the same run in float64.

    python -m benchmarks.cost drift --steps 100000

A 12 x 8 weight with an adapter of rank 2 learns random targets, with a learning rate that falls to
zero. "drift" is the largest distance of the weight from that in float64 at the tenths of the run,
relative to the way from the start, and "basis" how far the bases are from orthonormal at the end.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import markdown
from benchmarks.command_line import add_results
from benchmarks.records import Row, append
from loft_jax import loft_adamw
from loft_jax.algorithm.second_moment import SecondMomentName

M, N, RANK, BATCHES, ROWS = 12, 8, 2, 64, 6


def weights(
    second_moment: SecondMomentName, steps: int, dtype: type
) -> tuple[list[np.ndarray], int, float]:
    """The product at the tenths of the run, the last count, and the error of the bases."""
    draw = np.random.default_rng(1)
    array = lambda *shape: jnp.asarray(draw.normal(size=shape), dtype)
    x, y, base = array(BATCHES, ROWS, M), array(BATCHES, ROWS, N), array(M, N) / M**0.5
    params = {"lora_a": array(M, RANK) / M**0.5, "lora_b": array(RANK, N) / N**0.5}
    schedule = optax.cosine_decay_schedule(1e-2, steps)
    tx = loft_adamw(schedule, second_moment=second_moment)

    def loss(params: dict, k: jax.Array) -> jax.Array:
        error = x[k] @ (base + params["lora_a"] @ params["lora_b"]) - y[k]
        return jnp.sum(jnp.logaddexp(error, -error))

    def step(carry: tuple, k: jax.Array) -> tuple[tuple, None]:
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, k % BATCHES), state, params)
        return (optax.apply_updates(params, updates), state), None

    tenth = jax.jit(lambda carry, at: jax.lax.scan(step, carry, at)[0])
    carry: Any = (params, tx.init(params))
    found = [params["lora_a"] @ params["lora_b"]]
    for at in np.split(np.arange(steps), 10):
        carry = tenth(carry, jnp.asarray(at))
        found.append(carry[0]["lora_a"] @ carry[0]["lora_b"])
    state: Any = carry[1][0]
    bases = (np.asarray(state.basis["lora_a"]), np.asarray(state.basis["lora_b"]).T)
    off = max(float(np.abs(q.T @ q - np.eye(RANK)).max()) for q in bases)
    return [np.asarray(w, np.float64) for w in found], int(state.count), off


def measure(second_moment: SecondMomentName, steps: int) -> Row:
    with jax.enable_x64(True):
        exact, count, _ = weights(second_moment, steps, np.float64)
    single, count32, off = weights(second_moment, steps, np.float32)
    assert count == count32 == steps
    norm = np.linalg.norm
    drifts = [norm(w - v) / norm(v - exact[0]) for w, v in zip(single[1:], exact[1:], strict=True)]
    drift, basis = f"{max(drifts):.1e}", f"{off:.1e}"
    return {"second_moment": second_moment, "steps": steps, "drift": drift, "basis": basis}


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    return markdown.table(list(rows[0]), [list(row.values()) for row in rows])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=100_000, help="a multiple of ten")
    add_results(parser)


def run(options: argparse.Namespace) -> None:
    rows = [measure(second, options.steps) for second in ("calibrated", "factored")]
    append(options.results, rows)
    print(table(rows))
