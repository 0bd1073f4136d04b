"""What precision the products of the hot loop need: errors of LoFT's path with each rounded.

    python benchmarks/precision.py

Accelerators multiply float32 matrices in pieces of bfloat16 or TF32: one pass, or several that
recover most of the digits. Here their products are emulated, one kind at a time and all together,
in an optimizer that is otherwise float32, and the path of the weight is compared with the same path
in float64: the norm of the difference, relative to how far the weight has moved. The gradients are
a fixed signal with noise of its size, and do not depend on the path, so that errors do not correct
themselves. Then the same for second moments kept in bfloat16, rounded to nearest and by chance.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import append

from loft_jax import _projection, loft_adamw
from loft_jax.transforms import _adam_step

M, N = 256, 192
STEPS = (1, 5, 20, 100, 1000)
Product = Callable[[jax.Array, jax.Array], jax.Array]


def rounded(x: jax.Array, bits: int) -> jax.Array:
    """``x`` (float32) to a significand of so many bits, to nearest: 8 are bfloat16's, 11 TF32's."""
    drop = 24 - bits
    as_bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    half = jnp.uint32(1 << (drop - 1))
    kept = (as_bits + half) & jnp.uint32(0xFFFFFFFF << drop & 0xFFFFFFFF)
    return jax.lax.bitcast_convert_type(kept, jnp.float32)


def in_one_pass(bits: int) -> Product:
    return lambda x, y: jnp.matmul(rounded(x, bits), rounded(y, bits))


def in_three_passes(bits: int) -> Product:
    """High parts, and each high part with the other's low part."""

    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        x_high, y_high = rounded(x, bits), rounded(y, bits)
        x_low, y_low = rounded(x - x_high, bits), rounded(y - y_high, bits)
        return x_high @ y_high + (x_high @ y_low + x_low @ y_high)

    return product


PRODUCTS: dict[str, Product] = {
    "float32": jnp.matmul,
    "bfloat16": in_one_pass(8),
    "TF32": in_one_pass(11),
    "bfloat16, 3 passes": in_three_passes(8),
    "TF32, 3 passes": in_three_passes(11),
}
PLACES = ("moment", "second moment", "projection")


@contextlib.contextmanager
def products(product: Product, places: tuple[str, ...], rank: int) -> Iterator[None]:
    """Puts a product in the place of the hot loop's, where what it sums over is a given place's."""
    own = _projection.product
    place_of = {rank: "moment", rank * (rank + 1) // 2: "second moment"}

    def chosen(x: jax.Array, y: jax.Array) -> jax.Array:
        here = place_of.get(x.shape[-1], "projection") in places
        return product(x, y) if here else own(x, y)

    _projection.product = chosen
    try:
        yield
    finally:
        _projection.product = own


def path(
    rank: int, condition: float, dtype: Any, nu_dtype: Any = None, seed: int = 0
) -> dict[int, np.ndarray]:
    """How far the weight has moved after each of `STEPS`."""
    rng = np.random.default_rng(seed)
    scales = np.geomspace(1, 1 / condition, rank)
    u, v = (np.linalg.qr(rng.normal(size=(size, rank)))[0] * scales for size in (M, N))
    signal = rng.normal(size=(M, 8)) @ rng.normal(size=(8, N)) / 8**0.5
    params = {"lora_a": jnp.asarray(u, dtype), "lora_b": jnp.asarray(v.T, dtype)}
    start = u @ v.T
    tx = loft_adamw(1e-3, weight_decay=0.0, nu_dtype=nu_dtype)
    state = tx.init(params)

    @jax.jit
    def step(gradient: jax.Array, state: Any, params: Any) -> tuple[Any, Any]:
        grads = {
            "lora_a": gradient @ params["lora_b"].T,
            "lora_b": params["lora_a"].T @ gradient,
        }
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    moved = {}
    for k in range(1, max(STEPS) + 1):
        gradient = signal + rng.normal(size=(M, N))
        params, state = step(jnp.asarray(gradient, dtype), state, params)
        if k in STEPS:
            a, b = (np.asarray(params[name], np.float64) for name in ("lora_a", "lora_b"))
            moved[k] = a @ b - start
    return moved


def measure(rank: int, condition: float) -> list[dict[str, Any]]:
    """Relative errors of every product in every place."""
    with jax.enable_x64(True):
        exact = path(rank, condition, jnp.float64)
    rows = []
    for name, product in PRODUCTS.items():
        for places in [PLACES] if name == "float32" else [*((x,) for x in PLACES), PLACES]:
            with products(product, places, rank):
                moved = path(rank, condition, jnp.float32)
            where = "all products" if places == PLACES else places[0]
            rows.append({"arithmetic": name, "where": where, "errors": errors(moved, exact)})
    by_chance = path(rank, condition, jnp.float32, jnp.bfloat16)
    with to_nearest():
        nearest = path(rank, condition, jnp.float32, jnp.bfloat16)
    for name, moved in {"by chance": by_chance, "to nearest": nearest}.items():
        where = "second moment's state"
        rows.append(
            {"arithmetic": f"bfloat16, {name}", "where": where, "errors": errors(moved, exact)}
        )
    return [{"rank": rank, "condition": condition} | row for row in rows]


def errors(moved: dict[int, np.ndarray], exact: dict[int, np.ndarray]) -> list[float]:
    relative = (np.linalg.norm(moved[k] - exact[k]) / np.linalg.norm(exact[k]) for k in STEPS)
    return [float(f"{x:.2g}") for x in relative]


@contextlib.contextmanager
def to_nearest() -> Iterator[None]:
    """Keeps second moments rounded to nearest, as a plain cast would."""
    own = _adam_step.round_at_random
    _adam_step.round_at_random = lambda x, dtype, step: x.astype(dtype)
    try:
        yield
    finally:
        _adam_step.round_at_random = own


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 16])
    parser.add_argument("--conditions", nargs="+", type=float, default=[1.0, 1e3])
    parser.add_argument("--results", type=Path, help="append the rows to this JSON-lines file")
    options = parser.parse_args()
    print(
        "| rank | condition | arithmetic | where | " + " | ".join(f"step {k}" for k in STEPS) + " |"
    )
    print("|---" * (4 + len(STEPS)) + "|")
    for rank in options.ranks:
        for condition in options.conditions:
            rows = measure(rank, condition)
            append(options.results, rows)
            for row in rows:
                cells = " | ".join(f"{x:.1e}" for x in row["errors"])
                where = f"| {rank} | {condition:.0e} | {row['arithmetic']} | {row['where']} |"
                print(f"{where} {cells} |", flush=True)


if __name__ == "__main__":
    main()
