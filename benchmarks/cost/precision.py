"""Emulates low-precision products in LoFT's inner loop, and measures the error of its path.

    python -m benchmarks.cost precision

Accelerators multiply float32 matrices in pieces of bfloat16 or TF32: in one pass, or in several
that recover most of the digits. The benchmark emulates their products, one kind at a time and all
together, in an optimizer that otherwise uses float32. It compares the path of the weight with the
same path in float64: the norm of the difference, relative to how far the weight has moved. The
gradients are a fixed signal with noise of its size and do not depend on the path, so errors do not
correct themselves. The last rows store second moments in bfloat16, rounded stochastically and to
nearest.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import markdown
from benchmarks.command_line import add_results
from benchmarks.records import Row, append
from loft_jax import loft_adamw
from loft_jax.algorithm import calibrated
from loft_jax.execution import update

M, N = 256, 192
STEPS = (1, 5, 20, 100, 1000)
Product = Callable[[jax.Array, jax.Array], jax.Array]


def rounded(x: jax.Array, bits: int) -> jax.Array:
    """Rounds float32 to nearest with a significand of ``bits``: 8 in bfloat16, 11 in TF32."""
    drop = 24 - bits
    as_bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    half = jnp.uint32(1 << (drop - 1))
    kept = (as_bits + half) & jnp.uint32(0xFFFFFFFF << drop & 0xFFFFFFFF)
    return jax.lax.bitcast_convert_type(kept, jnp.float32)


def in_one_pass(bits: int) -> Product:
    """The product of both matrices rounded."""
    return lambda x, y: jnp.matmul(rounded(x, bits), rounded(y, bits))


def in_three_passes(bits: int) -> Product:
    """The product of the high parts, plus each high part times the other's low part."""

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
"""The products of the loop, distinguished by the length of the sums: r, r (r + 1) / 2, other."""


@contextlib.contextmanager
def products(product: Product, places: tuple[str, ...], rank: int) -> Iterator[None]:
    """Replaces the products of the loop in these places."""
    own = calibrated.product
    place_of = {rank: "moment", rank * (rank + 1) // 2: "second moment"}

    def chosen(x: jax.Array, y: jax.Array) -> jax.Array:
        here = place_of.get(x.shape[-1], "projection") in places
        return product(x, y) if here else own(x, y)

    calibrated.product = chosen
    jax.clear_caches()  # of the steps that were traced with the other product
    try:
        yield
    finally:
        calibrated.product = own
        jax.clear_caches()


@contextlib.contextmanager
def to_nearest() -> Iterator[None]:
    """Rounds stored second moments to nearest, as a plain cast does."""
    own = update.stochastic_round
    update.stochastic_round = lambda x, dtype, step: x.astype(dtype)
    jax.clear_caches()
    try:
        yield
    finally:
        update.stochastic_round = own
        jax.clear_caches()


def path(rank: int, condition: float, dtype: Any, nu_dtype: Any = None) -> dict[int, np.ndarray]:
    """How far the weight has moved after each of `STEPS`."""
    rng = np.random.default_rng(0)
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


def measure(rank: int, condition: float) -> list[Row]:
    """The relative errors of each product in each place, and of stored second moments."""
    with jax.enable_x64(True):
        exact = path(rank, condition, jnp.float64)
    paths = {}
    for name, product in PRODUCTS.items():
        for places in [PLACES] if name == "float32" else [*((x,) for x in PLACES), PLACES]:
            where = "all products" if places == PLACES else places[0]
            with products(product, places, rank):
                paths[name, where] = path(rank, condition, jnp.float32)
    where = "second moment's state"
    paths["bfloat16, stochastic", where] = path(rank, condition, jnp.float32, jnp.bfloat16)
    with to_nearest():
        paths["bfloat16, to nearest", where] = path(rank, condition, jnp.float32, jnp.bfloat16)
    return [
        {
            "rank": rank,
            "condition": condition,
            "arithmetic": arithmetic,
            "where": where,
            "errors": errors(moved, exact),
        }
        for (arithmetic, where), moved in paths.items()
    ]


def errors(moved: dict[int, np.ndarray], exact: dict[int, np.ndarray]) -> list[float]:
    """The relative error after each of `STEPS`."""
    relative = (np.linalg.norm(moved[k] - exact[k]) / np.linalg.norm(exact[k]) for k in STEPS)
    return [float(f"{x:.2g}") for x in relative]


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    heads = ["rank", "condition", "arithmetic", "where", *(f"step {k}" for k in STEPS)]
    lines = [
        [
            row["rank"],
            f"{row['condition']:.0e}",
            row["arithmetic"],
            row["where"],
            *(f"{x:.1e}" for x in row["errors"]),
        ]
        for row in rows
    ]
    return markdown.table(heads, lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 16])
    parser.add_argument("--conditions", nargs="+", type=float, default=[1.0, 1e3])
    add_results(parser)


def run(options: argparse.Namespace) -> None:
    rows = []
    for rank in options.ranks:
        for condition in options.conditions:
            found = measure(rank, condition)
            append(options.results, found)
            rows += found
    print(table(rows))
