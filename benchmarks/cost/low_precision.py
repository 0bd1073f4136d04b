"""Measures how LoFT descends when the forward pass is in bfloat16 or float16, and rows are few.

    python -m benchmarks.cost low-precision --rows 1 4 16 --ranks 4 16

Random problems of linear regression: a frozen 64 x 64 weight, an adapter whose factors are float32,
and a layer in low precision, 200 steps at a constant rate. With fewer rows than the rank, gradients
have a lower rank than the adapter, which is where unbalanced factors fail. "lora" is `optax.adamw`
on the factors. In float16 the loss is scaled by 4096.

For each dtype the first table counts the problems whose loss at the end is at most 1.05 times the
same problem's in float32; those that are not, but whose excess is below the rounding of the outputs
(the square of the dtype's relative rounding, of the loss at the start); and the rest. Then the
largest excess and the highest loss on the way, both in parts of the loss at the start, and the
largest entry that a factor had. The second table has them by rows and rank, with the median loss at
the end. --without-balance adds balance=False, alone and with the trust bound of gradient_dtype.
"""

import argparse
import functools
from collections.abc import Iterable, Sequence
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
    "lora": lambda **options: optax.adamw(3e-3),
}
WIDTH, STEPS = 64, 200
LOW = ("bfloat16", "float16")
ARMS = ("balance=True", "balance=False", "balance=False, gradient_dtype")
"""What keeps the factors in order in low precision; the first is the default."""


class Descents(NamedTuple):
    """Losses at each step, ``(rows, problems, steps)``, and the largest entries of the factors."""

    losses: np.ndarray
    largest: np.ndarray


def descend(
    tx: optax.GradientTransformation, rows: Sequence[int], rank: int, dtype: str, problems: int
) -> Descents:
    """Trains on random problems with these numbers of rows, all of them at once."""
    cast = lambda x: x.astype(dtype)
    scale = 2.0**12 if dtype == "float16" else 1.0

    def run(rows: jax.Array, seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), rows), 4)
        shapes = ((WIDTH, WIDTH), (max_rows, WIDTH), (max_rows, WIDTH), (WIDTH, rank))
        w, x, y, a = map(jax.random.normal, keys, shapes)
        # Other rows are zero and change nothing, so that all numbers of rows share a program.
        x, y = (z * (jnp.arange(max_rows) < rows)[:, None] for z in (x, y))
        params = {"lora_a": a / 8, "lora_b": jnp.zeros((rank, WIDTH))}

        def loss(p: Any) -> jax.Array:
            out = cast(x) @ cast(w / 8) + (cast(x) @ cast(p["lora_a"])) @ cast(p["lora_b"])
            return scale * jnp.sum((out.astype(jnp.float32) - y) ** 2) / (rows * WIDTH)

        def step(carry: tuple[Any, Any], _: None) -> tuple[Any, Any]:
            params, state = carry
            value, gradients = jax.value_and_grad(loss)(params)
            gradients = jax.tree.map(lambda g: g / scale, gradients)
            updates, state = tx.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            largest = jnp.stack([jnp.abs(p).max() for p in jax.tree.leaves(params)]).max()
            return (params, state), (value / scale, largest)

        return jax.lax.scan(step, (params, tx.init(params)), None, length=STEPS)[1]

    max_rows = max(rows)
    seeds = jnp.arange(problems)
    of_seeds = jax.vmap(run, (None, 0))
    found = jax.jit(jax.vmap(of_seeds, (0, None)))(jnp.asarray(rows), seeds)
    losses, largest = map(np.asarray, found)
    losses, largest = (np.where(np.isfinite(x), x, np.inf) for x in (losses, largest))
    return Descents(losses, largest.max(axis=-1))


def measure(
    name: str,
    rows: Sequence[int],
    rank: int,
    problems: int,
    arms: Sequence[str] = ARMS[:1],
    dtypes: Sequence[str] = LOW,
) -> list[Row]:
    """Trains with one optimizer in each dtype; a row for each, and for each number of rows."""
    exact = descend(OPTIMIZERS[name](), rows, rank, "float32", problems)
    found = [row_of(name, rank, "float32", rows, exact, exact)]
    for arm in arms:
        label = name if arm == ARMS[0] else f"{name}, {arm}"
        for dtype in dtypes:
            bound = {"gradient_dtype": dtype} if arm == ARMS[2] else {}
            tx = OPTIMIZERS[name](balance=arm == ARMS[0], **bound)
            one = descend(tx, rows, rank, dtype, problems)
            found.append(row_of(label, rank, dtype, rows, one, exact))
    return [row for of_dtype in found for row in of_dtype]


def row_of(
    name: str, rank: int, dtype: str, rows: Sequence[int], one: Descents, exact: Descents
) -> list[Row]:
    """Compares the problems in a dtype with the same in float32."""
    start, end = exact.losses[..., 0], exact.losses[..., -1]
    final = one.losses[..., -1]
    rounding = float(jnp.finfo(dtype).eps / 2) ** 2
    within = final <= 1.05 * end
    rounded = ~within & (final - end <= rounding * start)
    return [
        {
            "optimizer": name,
            "rows": count,
            "rank": rank,
            "dtype": dtype,
            "problems": len(final[k]),
            "within": int(within[k].sum()),
            "rounded": int(rounded[k].sum()),
            "final": float(np.median(final[k])),
            "excess": float(np.max((final - end)[k] / start[k])),
            "peak": float(np.max(one.losses[k].max(axis=-1) / start[k])),
            "largest": float(one.largest[k].max()),
        }
        for k, count in enumerate(rows)
    ]


def summary(rows: Iterable[Row]) -> str:
    """All problems of an optimizer and a dtype together, in Markdown."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["optimizer"], row["dtype"]), []).append(row)
    heads = ["optimizer", "dtype", "problems", "within 5 %", "rounding", "others"]
    lines = []
    for (name, dtype), of_group in groups.items():
        if dtype == "float32":
            continue
        total, within, rounded = (
            sum(row[x] for row in of_group) for x in ("problems", "within", "rounded")
        )
        most = [f"{max(row[x] for row in of_group):.2g}" for x in ("excess", "peak", "largest")]
        lines.append([name, dtype, total, within, rounded, total - within - rounded, *most])
    return markdown.table([*heads, "excess", "peak", "largest"], lines)


def table(rows: Iterable[Row]) -> str:
    """The rows in Markdown."""
    heads = ["optimizer", "rows", "rank", "dtype", "final", "excess", "peak", "largest"]
    show = lambda x: f"{x:.2g}" if isinstance(x, float) else x
    return markdown.table(heads, [[show(row[head]) for head in heads] for row in rows])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--problems", type=int, default=5, help="of each rank and number of rows")
    parser.add_argument("--without-balance", action="store_true", help="also show what is lost")
    add_results(parser)


def run(options: argparse.Namespace) -> None:
    found: list[Row] = []
    for name in options.optimizers:
        arms = ARMS if options.without_balance and name != "lora" else ARMS[:1]
        for rank in options.ranks:
            new = measure(name, options.rows, rank, options.problems, arms)
            append(options.results, new)
            found += new
    print(summary(found), table(found), sep="\n\n")
