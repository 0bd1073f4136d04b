"""Measures what casting the factors to bfloat16 and float16 loses of their product.

    python -m benchmarks.cost casts

Adapters of rank 8 fit a random 256 x 192 matrix, 300 steps in float32 from a random `a`. The eight
singular values of the matrix fall by a constant factor, so the smallest are easily lost. The table
has the relative error of the product after rounding the factors as training left them, without and
with the balance of the factors, and after `loft_jax.adapters.cast_factors`, which `save_peft` uses.
The last column divides it by the error of the factors that `optax.adamw` ("lora") left.
"""

import argparse
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import markdown
from benchmarks.command_line import add_results
from benchmarks.records import Row, append
from loft_jax import loft_adamw, loft_muon
from loft_jax.adapters import cast_factors

M, N, RANK, STEPS = 256, 192, 8, 300
FALLS = (0.9, 0.5, 0.1, 0.01)
OPTIMIZERS = {
    "lora": lambda balance: optax.adamw(1e-2, weight_decay=0.0),
    "calibrated": functools.partial(loft_adamw, 1e-2, weight_decay=0.0),
    "factored": functools.partial(loft_adamw, 1e-2, weight_decay=0.0, second_moment="factored"),
    "muon": functools.partial(loft_muon, 0.1, consistent_rms=0.2),
}


Factors = dict[str, np.ndarray]


class Problem(NamedTuple):
    """The matrix to fit, and the factors at the start."""

    target: np.ndarray
    start: Factors


def make_problem(falls_by: float, seed: int) -> Problem:
    """A random problem whose singular values fall by a factor."""
    draw = np.random.default_rng(seed)
    u, v = (np.linalg.qr(draw.normal(size=(size, RANK)))[0] for size in (M, N))
    values = falls_by ** np.arange(RANK)
    # Entries of size 1.
    target = u * values @ v.T * np.sqrt(M * N) / np.linalg.norm(values)
    start = {
        "lora_a": np.float32(draw.normal(size=(M, RANK)) / np.sqrt(M)),
        "lora_b": np.zeros((RANK, N), np.float32),
    }
    return Problem(target.astype(np.float32), start)


def fit(tx: optax.GradientTransformation, problems: Sequence[Problem]) -> list[Factors]:
    """The factors of each problem after training, all problems at once."""

    def train(problem: Problem) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.mean((params["lora_a"] @ params["lora_b"] - problem.target) ** 2)

        def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        start = (problem.start, tx.init(problem.start))
        return jax.lax.scan(step, start, None, length=STEPS)[0][0]

    trained = jax.jit(jax.vmap(train))(jax.tree.map(lambda *x: np.stack(x), *problems))
    trained = jax.tree.map(np.asarray, trained)
    return [jax.tree.map(lambda x, k=k: x[k], trained) for k in range(len(problems))]


def error(factors: Factors, dtype: str) -> float:
    """The relative error of the product after a plain cast."""
    a, b = (x.astype(np.float64) for x in (factors["lora_a"], factors["lora_b"]))
    with np.errstate(over="ignore", invalid="ignore"):
        low_a, low_b = (
            x.astype(jnp.dtype(dtype)).astype(np.float64)
            for x in (factors["lora_a"], factors["lora_b"])
        )
        found = np.linalg.norm(low_a @ low_b - a @ b) / np.linalg.norm(a @ b)
    return float(found) if np.isfinite(found) else np.inf


def measure(falls: Sequence[float], seeds: int) -> list[Row]:
    """A row for each optimizer, matrix and dtype: the largest errors over the seeds."""
    rows = []
    for name, make in OPTIMIZERS.items():
        problems = [make_problem(falls_by, seed) for falls_by in falls for seed in range(seeds)]
        balanced = fit(make(balance=True), problems)
        unbalanced = [] if name == "lora" else fit(make(balance=False), problems)
        for k, falls_by in enumerate(falls):
            of_seeds = slice(k * seeds, (k + 1) * seeds)
            after, before = balanced[of_seeds], unbalanced[of_seeds]
            largest = lambda fitted: [float(abs(x["lora_a"]).max()) for x in fitted]
            for dtype in ("bfloat16", "float16"):
                cast = [cast_factors(factors, dtype).largest_error for factors in after]
                rows.append(
                    {
                        "dtype": dtype,
                        "falls_by": falls_by,
                        "optimizer": name,
                        "seeds": seeds,
                        "unbalanced": max((error(x, dtype) for x in before), default=None),
                        "plain": max(error(x, dtype) for x in after),
                        "cast_factors": max(cast),
                        "largest_unbalanced": max(largest(before), default=None),
                        "largest": max(largest(after)),
                    }
                )
    return rows


def table(rows: list[Row]) -> str:
    """The rows in Markdown, by dtype."""
    heads = ["dtype", "falls by", "optimizer", "balance=False", "plain cast", "cast_factors"]
    heads += ["/ LoRA's", "largest entry of a", "balance=False"]
    lora = {
        (row["dtype"], row["falls_by"]): row["plain"] for row in rows if row["optimizer"] == "lora"
    }
    show = lambda x: None if x is None else f"{x:.2g}"
    lines = [
        [
            row["dtype"],
            row["falls_by"],
            row["optimizer"],
            *(show(row[name]) for name in ("unbalanced", "plain", "cast_factors")),
            f"{row['cast_factors'] / lora[row['dtype'], row['falls_by']]:.2f}",
            show(row["largest"]),
            show(row["largest_unbalanced"]),
        ]
        for row in sorted(rows, key=lambda row: (row["dtype"], -row["falls_by"]))
    ]
    return markdown.table(heads, lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--falls", nargs="+", type=float, default=list(FALLS))
    parser.add_argument("--seeds", type=int, default=3)
    add_results(parser)


def run(options: argparse.Namespace) -> None:
    rows = measure(options.falls, options.seeds)
    append(options.results, rows)
    print(table(rows))
