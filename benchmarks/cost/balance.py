"""Measures a step in which factors are balanced, by how many pairs need it.

    python -m benchmarks.cost balance

The pairs of SmolLM2's layers, of which the columns of some factors are nearly parallel. "all at
once" computes the new factorization of all pairs where one needs it; the package computes it for
those that do, a block of them at a time. The times include the Gram matrices of all factors, which
every step needs, and the products of all factors with the new factorizations.
"""

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import markdown
from benchmarks.command_line import add_results
from benchmarks.cost.pair_sets import PAIR_SETS, STACKED, adapters
from benchmarks.cost.timing import in_alternation, quartiles
from benchmarks.records import Row, append
from loft_jax import balance_factors
from loft_jax.execution import batching

PAIR_SET = PAIR_SETS["smollm2"]


def with_parallel_columns(params: Any, layers: int) -> Any:
    """The factors with nearly parallel columns of ``lora_a`` in the first layers."""

    def change(a: jax.Array) -> jax.Array:
        parallel = a[:, :, :1] + 0.01 * a
        return jnp.where(jnp.arange(len(a))[:, None, None] < layers, parallel, a)

    return {
        name: {**factors, "lora_a": change(factors["lora_a"])} for name, factors in params.items()
    }


@contextlib.contextmanager
def all_at_once() -> Iterator[None]:
    """Computes all pairs wherever one needs it."""
    own = batching._BLOCK_ENTRIES
    batching._BLOCK_ENTRIES = dict.fromkeys(own, 2**62)
    try:
        yield
    finally:
        batching._BLOCK_ENTRIES = own


def measure(rank: int, runs: int) -> list[Row]:
    """The times at one rank, a row for each number of pairs."""
    tx = balance_factors(STACKED)
    params = adapters(PAIR_SET, rank, stacked=True)
    zeros = jax.tree.map(jnp.zeros_like, params)
    update = lambda params: tx.update(zeros, tx.init(params), params)[0]
    # Random factors of a large rank need it too.
    params = optax.apply_updates(params, jax.jit(update)(params))
    compiled = {"in blocks": jax.jit(update).lower(params).compile()}
    with all_at_once():
        jax.clear_caches()
        compiled["all at once"] = jax.jit(update).lower(params).compile()
    rows = []
    for layers in (0, 1, PAIR_SET.layers):
        of = with_parallel_columns(params, layers)
        step = lambda fn, of=of: lambda: jax.block_until_ready(fn(of))
        times = in_alternation({name: step(fn) for name, fn in compiled.items()}, runs)
        row = {"rank": rank, "pairs": layers * len(PAIR_SET.shapes), "runs": runs}
        rows.append(row | {name: quartiles(x) for name, x in times.items()})
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    time = lambda x: "{1:.1f} ({0:.1f} to {2:.1f})".format(*x)
    cells = [[x["rank"], x["pairs"], time(x["in blocks"]), time(x["all at once"])] for x in rows]
    heads = ["rank", f"of {PAIR_SET.pairs} pairs", "in blocks, ms (quartiles)", "all at once, ms"]
    return markdown.table(heads, cells)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rank", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--runs", type=int, default=7)
    add_results(parser)


def run(options: argparse.Namespace) -> None:
    rows = [row for rank in options.rank for row in measure(rank, options.runs)]
    print(table(rows))
    append(options.results, rows)
