"""Measures the condition of the factors after 2,000 steps, with and without their balance.

    python -m benchmarks.cost factor-condition

A frozen random network of two layers of width 32, with adapters of rank 8, learns another one from
fresh batches of 16 examples; float32 throughout, at a constant learning rate. The table has the
loss over the last hundred steps, the condition (largest over smallest singular value) of the worse
factor, and its largest entry divided by the root of the largest entry of the product: the worse of
both layers. Balanced factors have the root of the condition of their product.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import markdown
from benchmarks.command_line import add_results
from benchmarks.records import Row, append
from loft_jax import loft_adamw, loft_muon, loft_sgd

WIDTH, RANK, BATCH, STEPS = 32, 8, 16, 2000
OPTIMIZERS = {
    "calibrated": functools.partial(loft_adamw, 1e-3, weight_decay=0.0),
    "factored": functools.partial(loft_adamw, 1e-3, weight_decay=0.0, second_moment="factored"),
    "muon": functools.partial(loft_muon, 1e-3, consistent_rms=0.2),
    "sgd": functools.partial(loft_sgd, 0.1),
    "lora": lambda balance: optax.adamw(3e-3, weight_decay=0.0),
}
Layers = list[dict[str, jax.Array]]


def train(tx: optax.GradientTransformation, steps: int) -> tuple[Layers, np.ndarray]:
    """The adapters of both layers, and the losses."""
    keys = jax.random.split(jax.random.key(0), 7)
    draw = lambda key, *shape: jax.random.normal(key, shape) / np.sqrt(shape[0])
    base = [draw(key, WIDTH, WIDTH) for key in keys[:2]]
    target = [draw(key, WIDTH, WIDTH) for key in keys[2:4]]
    start = [
        {"lora_a": draw(key, WIDTH, RANK), "lora_b": jnp.zeros((RANK, WIDTH))} for key in keys[4:6]
    ]

    def network(weights: list[jax.Array], x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ weights[0]) @ weights[1]

    def loss(adapters: Layers, x: jax.Array) -> jax.Array:
        adapted = [w + p["lora_a"] @ p["lora_b"] for w, p in zip(base, adapters, strict=True)]
        return jnp.mean((network(adapted, x) - network(target, x)) ** 2)

    def step(carry: tuple[Any, Any], key: jax.Array) -> tuple[Any, jax.Array]:
        adapters, state = carry
        x = jax.random.normal(key, (BATCH, WIDTH))
        value, gradients = jax.value_and_grad(loss)(adapters, x)
        updates, state = tx.update(gradients, state, adapters)
        return (optax.apply_updates(adapters, updates), state), value

    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
    (adapters, _), losses = run((start, tx.init(start)), jax.random.split(keys[6], steps))
    return adapters, np.asarray(losses)


def measure(name: str, balance: bool, steps: int = STEPS) -> Row:
    """Trains, and describes the factors of the worse layer."""
    adapters, losses = train(OPTIMIZERS[name](balance=balance), steps)
    conditions, entries = [], []
    for pair in adapters:
        a, b = (np.asarray(pair[x], np.float64) for x in ("lora_a", "lora_b"))
        for factor in (a, b):
            values = np.linalg.svd(factor, compute_uv=False)
            conditions.append(values[0] / values[-1] if values[-1] > 0 else np.inf)
            entries.append(abs(factor).max() / np.sqrt(abs(a @ b).max()))
    return {
        "optimizer": name if balance else f"{name}, balance=False",
        "steps": steps,
        "loss": float(losses[-100:].mean()),
        "condition": float(max(conditions)),
        "largest": float(max(entries)),
    }


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    heads = ["optimizer", "loss", "condition", "largest entry / root of the product's"]
    lines = [
        [row["optimizer"], *(f"{row[x]:.3g}" for x in ("loss", "condition", "largest"))]
        for row in rows
    ]
    return markdown.table(heads, lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    add_results(parser)


def run(options: argparse.Namespace) -> None:
    rows = []
    for name in options.optimizers:
        for balance in (True,) if name == "lora" else (False, True):
            rows.append(measure(name, balance))
            append(options.results, rows[-1:])
    print(table(rows))
