"""Measures how LoFT descends when the forward pass is in bfloat16 or float16, and rows are few.

    python -m benchmarks.cost low-precision --rows 1 4 16 --ranks 4 16

Random problems of linear regression: a frozen 64 x 64 weight, an adapter whose factors are float32,
and a layer in low precision, 200 steps at a constant rate. With fewer rows than the rank, gradients
have a lower rank than the adapter, which is where unbalanced factors fail. For each dtype the table
gives the median loss at the end, the largest excess over the same problem in float32, and the
highest loss on the way, both in parts of the loss at the start, and the largest entry of a factor.
In float16 the loss is scaled by 4096. "lora" is `optax.adamw` on the factors.
"""

import argparse
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import markdown
from benchmarks.command_line import add_results
from benchmarks.records import Row, append
from loft_jax import loft_adamw, loft_muon, loft_sgd

OPTIMIZERS = {
    "calibrated": functools.partial(loft_adamw, 1e-3),
    "factored": functools.partial(loft_adamw, 1e-3, second_moment="factored"),
    "muon": functools.partial(loft_muon, 1e-3),
    "sgd": functools.partial(loft_sgd, 0.01),
    "momentum": functools.partial(loft_sgd, 0.003, momentum=0.9),
    "lora": lambda balance: optax.adamw(3e-3),
}
WIDTH, STEPS = 64, 200


class Descents(NamedTuple):
    """Losses at each step, ``(problems, steps)``, and the largest entry that a factor had."""

    losses: np.ndarray
    largest: np.ndarray


def descend(
    tx: optax.GradientTransformation, rows: int, rank: int, dtype: str, problems: int
) -> Descents:
    """Trains on random problems, all of them at once."""
    cast = lambda x: x.astype(dtype)
    scale = 2.0**12 if dtype == "float16" else 1.0

    @jax.jit
    @jax.vmap
    def run(seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys = jax.random.split(jax.random.key(seed), 4)
        shapes = ((WIDTH, WIDTH), (rows, WIDTH), (rows, WIDTH), (WIDTH, rank))
        w, x, y, a = map(jax.random.normal, keys, shapes)
        params = {"lora_a": a / 8, "lora_b": jnp.zeros((rank, WIDTH))}

        def loss(p: Any) -> jax.Array:
            out = cast(x) @ cast(w / 8) + (cast(x) @ cast(p["lora_a"])) @ cast(p["lora_b"])
            return scale * jnp.mean((out.astype(jnp.float32) - y) ** 2)

        def step(carry: tuple[Any, Any], _: None) -> tuple[Any, Any]:
            params, state = carry
            value, gradients = jax.value_and_grad(loss)(params)
            gradients = jax.tree.map(lambda g: g / scale, gradients)
            updates, state = tx.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            largest = jnp.stack([jnp.abs(p).max() for p in jax.tree.leaves(params)]).max()
            return (params, state), (value / scale, largest)

        return jax.lax.scan(step, (params, tx.init(params)), None, length=STEPS)[1]

    losses, largest = map(np.asarray, run(jnp.arange(problems)))
    return Descents(np.where(np.isfinite(losses), losses, np.inf), largest.max(axis=1))


def measure(name: str, rows: int, rank: int, problems: int, balance: bool) -> list[Row]:
    """Trains with one optimizer in each dtype; a row for each."""
    found = {}
    for dtype in ("float32", "bfloat16", "float16"):
        tx = OPTIMIZERS[name](balance=balance or dtype == "float32")
        found[dtype] = descend(tx, rows, rank, dtype, problems)
    start, end = (found["float32"].losses[:, k] for k in (0, -1))
    return [
        {
            "optimizer": name if balance else f"{name}, balance=False",
            "rows": rows,
            "rank": rank,
            "dtype": dtype,
            "problems": problems,
            "final": float(np.median(one.losses[:, -1])),
            "excess": float(np.max((one.losses[:, -1] - end) / start)),
            "peak": float(np.max(one.losses.max(axis=1) / start)),
            "largest": float(one.largest.max()),
        }
        for dtype, one in found.items()
    ]


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    heads = ["optimizer", "rows", "rank", "dtype", "final", "excess", "peak", "largest"]
    show = lambda x: f"{x:.2g}" if isinstance(x, float) else x
    return markdown.table(heads, [[show(row[head]) for head in heads] for row in rows])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 4, 16, 32])
    parser.add_argument("--problems", type=int, default=8)
    parser.add_argument("--without-balance", action="store_true", help="show what is lost")
    add_results(parser)


def run(options: argparse.Namespace) -> None:
    found: list[Row] = []
    for name in options.optimizers:
        for rows in options.rows:
            for rank in options.ranks:
                balance = not options.without_balance
                new = measure(name, rows, rank, options.problems, balance)
                append(options.results, new)
                found += new
    print(table(found))
