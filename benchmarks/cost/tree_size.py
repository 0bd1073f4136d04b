"""Measures init, tracing and compile time of the optimizer against the size of the tree.

    python -m benchmarks.cost tree-size

"distinct" has pairs of distinct shapes, of which no two are computed as one batch. "layers" has
five pairs a layer, as in a model with separate layers. Ranks are 4 and weights small: what grows is
the number of leaves. The step of the optimizer alone is traced and compiled for this CPU, after
`optax.adamw` on the same tree. "init" is the first call of `init`, with the small programs that it
compiles. "describe" is `describe_pairs`. Seconds are those of the processor, of all threads, which
other programs on the machine change least. The exponent is the slope between the last two sizes on
logarithmic axes: 1 is proportional growth.
"""

import argparse
import contextlib
import io
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import markdown
from benchmarks.command_line import add_results
from benchmarks.cost.growth import CHOSEN, exponent
from benchmarks.cost.optimizer_step import OPTIMIZERS
from benchmarks.records import Row, append
from loft_jax import LoraPairs, describe_pairs

RANK = 4
SIZES = {"distinct": (125, 250, 500, 1000, 2000), "layers": (625, 1250, 2500, 5000)}
"""Numbers of pairs of each tree."""
TIMES = ("init_s", "trace_s", "compile_s")


def params_of(tree: str, pairs: int) -> Any:
    """Factors of so many pairs, two leaves each."""
    if tree == "layers":
        shapes = [(16 + k % 5, 16 + 2 * (k % 5)) for k in range(pairs)]
    else:
        side = int(np.ceil(pairs**0.5))
        shapes = [(8 + k // side, 8 + k % side) for k in range(pairs)]
    name = lambda k: f"layer{k // 5}/weight{'abcde'[k % 5]}"
    return {
        name(k): {"lora_a": np.full((m, RANK), 0.1, "f4"), "lora_b": np.ones((RANK, n), "f4")}
        for k, (m, n) in enumerate(shapes)
    }


def seconds(fn: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    found = fn()
    return round(time.process_time() - began, 3), found


def measure(
    tree: str, pairs: int, names: tuple[str, ...] = CHOSEN, compiled: bool = True
) -> list[Row]:
    """Measures the optimizers on one tree, a row for each, without compiling if told."""
    params = jax.tree.map(jnp.asarray, params_of(tree, pairs))
    with contextlib.redirect_stdout(io.StringIO()):
        described, found = seconds(lambda: describe_pairs(params))
    assert len(found.pairs) == pairs
    point = {"tree": tree, "value": pairs, "leaves": 2 * pairs, "describe_s": described}
    rows = []
    for name in names:
        jax.clear_caches()
        tx = OPTIMIZERS[name](1e-3, LoraPairs())

        def step(grads: Any, state: Any, params: Any, tx: Any = tx) -> tuple[Any, Any]:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        init_s, state = seconds(lambda tx=tx: jax.block_until_ready(tx.init(params)))
        jitted = jax.jit(step, donate_argnums=(1, 2))
        trace_s, lowered = seconds(lambda j=jitted, s=state: j.lower(params, s, params))
        row = point | {"optimizer": name, "init_s": init_s, "trace_s": trace_s}
        if compiled:
            row["compile_s"], program = seconds(lowered.compile)
            row["instructions"] = program.as_text().count(" = ")
        rows.append(row)
        print(row, flush=True)
    return rows


def table(rows: list[Row]) -> str:
    """The rows in Markdown, a line for each tree and optimizer, with the exponents."""

    def cells(tree: str, name: str) -> list[object]:
        found = [row for row in rows if (row["tree"], row["optimizer"]) == (tree, name)]
        line: list[object] = [tree, name, ", ".join(str(row["value"]) for row in found)]
        for column in (*TIMES, "describe_s"):
            slope = exponent(found, column)
            line.append(", ".join(f"{row[column]:.3g}" for row in found if column in row))
            line.append(None if slope is None else f"{slope:.2f}")
        return line

    named = [x for column in (*TIMES, "describe_s") for x in (f"{column[:-2]}, s", "exponent")]
    kinds = dict.fromkeys((row["tree"], row["optimizer"]) for row in rows)
    return markdown.table(["tree", "optimizer", "pairs", *named], [cells(*kind) for kind in kinds])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trees", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--pairs", type=int, nargs="+", help="only these numbers of pairs")
    parser.add_argument("--compiled", type=int, default=5000, help="compile no more than these")
    parser.add_argument("--optimizers", nargs="+", choices=CHOSEN, default=list(CHOSEN))
    add_results(parser)


def run(options: argparse.Namespace) -> None:
    # Otherwise the benchmark would measure a cache of compiled programs.
    jax.config.update("jax_enable_compilation_cache", False)
    rows = []
    for tree in options.trees:
        for pairs in options.pairs or SIZES[tree]:
            compiled = pairs <= options.compiled
            found = measure(tree, pairs, tuple(options.optimizers), compiled)
            append(options.results, found)
            rows += found
    print(table(rows))
