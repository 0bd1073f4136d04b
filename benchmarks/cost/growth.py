"""Measures how the cost of an optimizer step grows with rank, size, pairs and devices.

    python -m benchmarks.cost growth

One of the four varies while the others are fixed: one pair of a 1024 x 1024 weight at rank 16, and
32 stacked layers of LLaMA-7B's adapters for the devices. Steps run in alternation with
`optax.adamw`. State and temporaries are those of the compiled program; on several devices (the CPU
divided into as many, with the long axis of each factor sharded) they are those of one device. The
exponent is the slope between the last two points on logarithmic axes: 1 is proportional growth.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import markdown
from benchmarks.command_line import add_runs
from benchmarks.cost.optimizer_step import OPTIMIZERS, Step
from benchmarks.cost.pair_sets import PAIR_SETS, STACKED, PairSet, adapters
from benchmarks.cost.timing import in_alternation, quartiles
from benchmarks.records import Row, append
from loft_jax import LoraPairs
from loft_jax.sharding import state_shardings

CHOSEN = ("optax.adamw", "calibrated", "factored")
GROWTH: dict[str, Sequence[int]] = {
    "rank": (1, 2, 4, 8, 16, 32, 64),
    "size": (256, 512, 1024, 2048, 4096),
    "pairs": (1, 2, 4, 8, 16, 32, 64),
    "devices": (1, 2, 4, 8),
}


def one_size(axis: str, value: int) -> tuple[PairSet, int]:
    """The pairs and the rank at a value of the axis that varies."""
    rank = value if axis == "rank" else 16
    width = value if axis == "size" else 1024
    return PairSet(value if axis == "pairs" else 1, {"q": (width, width)}), rank


def measure(axis: str, value: int, runs: int) -> list[Row]:
    """Measures the chosen optimizers at one value, a row for each."""
    point = {"axis": axis, "value": value}
    if axis == "devices":
        return [point | {"optimizer": name} | on_devices(name, value) for name in CHOSEN]
    pair_set, rank = one_size(axis, value)
    params = adapters(pair_set, rank)
    steps = {name: Step(OPTIMIZERS[name](1e-3, LoraPairs()), params) for name in CHOSEN}
    times = in_alternation(steps, runs)
    return [
        point
        | {"optimizer": name, "step_ms": quartiles(times[name] / 2), "runs": runs}
        | steps[name].costs
        for name in CHOSEN
    ]


def on_devices(name: str, devices: int, pair_set: PairSet = PAIR_SETS["llama-7b"]) -> Row:
    """State and temporaries of one device in MB, from the program compiled for all devices."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("fsdp",))
    placed = lambda x, spec: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
    )
    specs = {"lora_a": P(None, "fsdp", None), "lora_b": P(None, None, "fsdp")}
    shapes = jax.eval_shape(lambda: adapters(pair_set, 16, stacked=True))
    params = {
        weight: {factor: placed(x, specs[factor]) for factor, x in pair.items()}
        for weight, pair in shapes.items()
    }
    tx = OPTIMIZERS[name](1e-3, STACKED)
    shardings = state_shardings(tx, params)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, params),
        shardings,
    )

    def step(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    of_params = jax.tree.map(lambda x: x.sharding, params)
    with jax.set_mesh(mesh):
        jitted = jax.jit(step, donate_argnums=(1, 2), out_shardings=(of_params, shardings))
        compiled = jitted.lower(params, state, params).compile()
    of_one = sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(state)
    )
    analysis = compiled.memory_analysis()
    temporary = round(analysis.temp_size_in_bytes / 1e6, 2) if analysis else None
    return {"state_mb": round(of_one / 1e6, 2), "temporary_mb": temporary}


def exponent(rows: Sequence[Row], column: str) -> float | None:
    """The slope of a column between the last two rows of an optimizer, on logarithmic axes."""
    last = [row for row in rows if row.get(column) is not None][-2:]
    if len(last) < 2:
        return None
    at = np.log([row["value"] for row in last])
    amounts = [row[column][1] if column == "step_ms" else row[column] for row in last]
    return float(np.diff(np.log(amounts))[0] / np.diff(at)[0]) if min(amounts) > 0 else None


def table(rows: list[Row]) -> str:
    """The rows in Markdown, with the exponents."""
    shown = lambda x: None if x is None else f"{x:.2f}"

    def cells(axis: str, name: str) -> list[object]:
        found = [row for row in rows if (row["axis"], row["optimizer"]) == (axis, name)]
        return [
            axis,
            name,
            ", ".join(str(row["value"]) for row in found),
            ", ".join(f"{row['step_ms'][1]:.3g}" for row in found if "step_ms" in row),
            shown(exponent(found, "step_ms")),
            ", ".join(f"{row['state_mb']:.3g}" for row in found),
            shown(exponent(found, "state_mb")),
            ", ".join(f"{row['temporary_mb']:.3g}" for row in found if row["temporary_mb"]),
        ]

    heads = ["axis", "optimizer", "values", "step, ms", "exponent", "state, MB", "exponent"]
    axes = dict.fromkeys(row["axis"] for row in rows)
    lines = [cells(axis, name) for axis in axes for name in CHOSEN]
    return markdown.table([*heads, "temporaries, MB"], lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--axes", nargs="+", choices=GROWTH, default=list(GROWTH))
    add_runs(parser, 9)


def run(options: argparse.Namespace) -> None:
    jax.config.update("jax_num_cpu_devices", max(GROWTH["devices"]))
    rows = []
    for axis in options.axes:
        for value in GROWTH[axis]:
            found = measure(axis, value, options.runs)
            append(options.results, found)
            rows += found
    print(table(rows))
