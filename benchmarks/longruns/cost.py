"""The time of a renewal, relative to that of a training step.

    python -m benchmarks.longruns cost

Processor times of one process, in alternation: a training step with LoFT (the language model of
the long runs, 8 x 64 bytes, and a wider one), a renewal with its moments, and a merge with a new
adapter. Medians and quartiles; and the seconds that each takes to compile.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import markdown, records
from benchmarks.command_line import add_runs
from benchmarks.longruns import language_model as model
from benchmarks.longruns.methods import METHODS, renewal_of
from benchmarks.longruns.training import objective_of, train
from benchmarks.longruns.transformer import new_adapters

MODELS = {"2 layers of 128": (2, 128), "4 layers of 512": (4, 512)}
BATCH, LENGTH, RANK, INTERVAL = 8, 64, 4, 250


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_runs(parser, 15)


def run(options: argparse.Namespace) -> None:
    rows = [measure(name, *size, options.runs) for name, size in MODELS.items()]
    records.append(options.results, rows)
    shown = lambda x: f"{x[1]:.1f} ({x[0]:.1f} to {x[2]:.1f})"
    lines = []
    for row in rows:
        step = row["step"]["ms"][1]
        for name in ("step", "renewal", "new adapter"):
            relative = row[name]["ms"][1] / step
            share = f"{relative / INTERVAL:.2%}" if name != "step" else None
            compiled = f"{row[name]['compile']:.1f}"
            cells = [row["model"], name, shown(row[name]["ms"]), f"{relative:.2f}", share, compiled]
            lines.append(cells)
    heads = ["model", "", "ms, median (quartiles)", "in steps"]
    print(markdown.table([*heads, f"of {INTERVAL} steps", "compile, s"], lines))


def measure(name: str, layers: int, width: int, runs: int) -> records.Row:
    """Returns milliseconds (quartiles and median) and compile times of one model."""
    base = model.init(jax.random.key(0), layers, width, LENGTH)
    batches = jax.random.randint(jax.random.key(1), (1, BATCH, LENGTH + 1), 0, model.VOCABULARY)
    draw = functools.partial(new_adapters, params=base, rank=RANK)
    tx = METHODS["loft"].optimizer(lambda count: 1e-3 * jnp.ones_like(count, jnp.float32))
    adapter = draw(jax.random.key(2))
    state, key = tx.init(adapter), jax.random.key(3)
    step = functools.partial(train, tx, objective_of(model.loss, full=False))
    programs: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "step": (step, (base, adapter, state, batches.astype(jnp.uint8))),
        "renewal": (renewal_of(METHODS["momentum-250"], draw, tx), (base, adapter, state, key)),
        "new adapter": (
            renewal_of(METHODS["loft-anew-250"], draw, tx),
            (base, adapter, state, key),
        ),
    }
    calls, row = {}, {"model": name, "rank": RANK, "tokens": BATCH * LENGTH}
    for of, (function, arguments) in programs.items():
        lowered = jax.jit(function).lower(*arguments)
        begin = time.process_time()
        compiled = lowered.compile()
        row[of] = {"compile": round(time.process_time() - begin, 2)}
        calls[of] = functools.partial(compiled, *arguments)
    for of, times in _processor_times(calls, runs).items():
        quartiles = np.quantile(times, (0.25, 0.5, 0.75))
        row[of]["ms"] = [round(1000 * float(x), 2) for x in quartiles]
    return row


def _processor_times(calls: dict[str, Callable[[], Any]], runs: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for k in range(runs + 1):
        for name, call in calls.items():
            begin = time.process_time()
            jax.block_until_ready(call())
            if k:
                times[name].append(time.process_time() - begin)
    return times
