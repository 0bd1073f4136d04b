"""How the cost of an optimizer step grows: with rank, size of the weight, pairs and devices.

    python benchmarks/growth.py

One of the four varies, the others stand still: one pair of a 1024 x 1024 weight at rank 16, and 32
stacked layers of LLaMA-7B's adapters for the devices. Times are measured in alternation with
`optax.adamw`'s. State and temporaries are those of the compiled program, on several devices (the
CPU as many, each factor's long axis split) those of one. The exponent is the slope between the last
two points on logarithmic axes: 1 is proportional growth.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before jax starts: devices to compile for
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    )

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from optimizer_step import OPTIMIZERS, Step
from pair_sets import PAIR_SETS, STACKED, PairSet, adapters
from timing import append, in_alternation, quartiles

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
    """The pairs and the rank at a point of the growth."""
    rank = value if axis == "rank" else 16
    width = value if axis == "size" else 1024
    return PairSet(value if axis == "pairs" else 1, {"q": (width, width)}), rank


def measure(axis: str, value: int, runs: int) -> list[dict[str, Any]]:
    """Rows of the chosen optimizers at one point."""
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


def on_devices(name: str, devices: int, pair_set: PairSet = PAIR_SETS["llama-7b"]) -> dict:
    """State and temporaries of one device, in megabytes, from the program compiled for all."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("fsdp",))
    placed = lambda x, spec: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
    )
    split = {"lora_a": P(None, "fsdp", None), "lora_b": P(None, None, "fsdp")}
    whole = jax.eval_shape(lambda: adapters(pair_set, 16, stacked=True))
    params = {
        weight: {factor: placed(x, split[factor]) for factor, x in pair.items()}
        for weight, pair in whole.items()
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


def exponent(rows: Sequence[dict[str, Any]], of: str) -> float | None:
    """The slope of ``of`` between the last two of an optimizer's rows."""
    last = [row for row in rows if row.get(of) is not None][-2:]
    if len(last) < 2:
        return None
    at = np.log([row["value"] for row in last])
    amounts = [row[of][1] if of == "step_ms" else row[of] for row in last]
    return float(np.diff(np.log(amounts))[0] / np.diff(at)[0]) if min(amounts) > 0 else None


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown, with the exponents."""
    lines = [
        "| grows | optimizer | values | step, ms | exponent | state, MB | exponent | "
        "temporaries, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    shown = lambda x: "" if x is None else f"{x:.2f}"
    for axis in dict.fromkeys(row["axis"] for row in rows):
        for name in CHOSEN:
            of_one = [row for row in rows if (row["axis"], row["optimizer"]) == (axis, name)]
            cells = [
                ", ".join(str(row["value"]) for row in of_one),
                ", ".join(f"{row['step_ms'][1]:.3g}" for row in of_one if "step_ms" in row),
                shown(exponent(of_one, "step_ms")),
                ", ".join(f"{row['state_mb']:.3g}" for row in of_one),
                shown(exponent(of_one, "state_mb")),
                ", ".join(f"{row['temporary_mb']:.3g}" for row in of_one if row["temporary_mb"]),
            ]
            lines.append(f"| {axis} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--axes", nargs="+", choices=GROWTH, default=list(GROWTH))
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--results", type=Path, help="append the rows to this JSON-lines file")
    options = parser.parse_args()
    rows = []
    for axis in options.axes:
        for value in GROWTH[axis]:
            found = measure(axis, value, options.runs)
            append(options.results, found)
            rows += found
    print(table(rows))


if __name__ == "__main__":
    main()
