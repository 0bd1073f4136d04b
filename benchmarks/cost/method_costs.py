"""Counts the state and the arithmetic of each optimizer in its program, for one pair.

    python -m benchmarks.cost method-costs --m 4096 --n 4096 --rank 16

The counts do not depend on the machine: the numbers of the state, and the multiply-adds (twice that
in FLOPs) of the matrix products of one step, those of the more expensive branch where the factors
alternate. Elementwise work, decompositions of r x r matrices and the balance of the factors are not
counted. The base is `optax.adamw` on the factors, with a state of ``2 r (m + n)`` and no products.
"""

import argparse
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import markdown
from loft_jax import baselines, loft_adamw, loft_muon, loft_sgd

OPTIMIZERS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "LoRA: optax.adamw": optax.adamw,
    "loft_adamw, calibrated": functools.partial(loft_adamw, balance=False),
    "loft_adamw, factored": functools.partial(loft_adamw, second_moment="factored", balance=False),
    "loft_adamw, diagonal": functools.partial(loft_adamw, second_moment="diagonal", balance=False),
    "loft_muon": functools.partial(loft_muon, balance=False),
    "loft_sgd": functools.partial(loft_sgd, balance=False),
    "loft_sgd, momentum": functools.partial(loft_sgd, momentum=0.9, balance=False),
    "lora_plus": baselines.lora_plus,
    "scaled_adamw": baselines.scaled_adamw,
    "scaled_sgd": baselines.scaled_sgd,
    "lora_fa": baselines.lora_fa,
    "altlora": baselines.altlora,
    "altlora_plus": baselines.altlora_plus,
    "lora_pro": baselines.lora_pro,
    "lora_rite": baselines.lora_rite,
    "adalora": lambda rate: baselines.adalora(optax.adamw(rate), target_rank=1, total_step=10),
}


def costs(name: str, m: int, n: int, r: int) -> tuple[int, int]:
    """The numbers of state and the multiply-adds of a step for one pair."""
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    params = {"lora_a": shape(m, r), "lora_b": shape(r, n)}
    if name == "adalora":  # its adapters have singular values too
        params["lora_e"] = shape(r)
    tx = OPTIMIZERS[name](1e-3)
    state = jax.eval_shape(tx.init, params)
    program = jax.make_jaxpr(tx.update)(params, state, params).jaxpr
    return sum(x.size for x in jax.tree.leaves(state) if x.ndim), products(program)


def products(jaxpr: Any) -> int:
    """The multiply-adds of the matrix products of a program."""
    total = 0
    for equation in jaxpr.eqns:
        inner = [
            products(getattr(x, "jaxpr", x))
            for x in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            )
            if hasattr(x, "eqns")
        ]
        match equation.primitive.name:
            case "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                sizes = equation.invars[0].aval.shape
                out = math.prod(equation.outvars[0].aval.shape)
                total += out * math.prod(sizes[axis] for axis in contracted)
            case "scan":
                total += equation.params["length"] * sum(inner)
            case "cond":
                total += max(inner)
            case _:
                total += sum(inner)
    return total


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--m", type=int, default=4096)
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)


def run(options: argparse.Namespace) -> None:
    m, n, r = options.m, options.n, options.rank
    print(f"m = {m}, n = {n}, r = {r}; forward and backward through W take 2 m n per token\n")
    heads = ["optimizer", "state / r (m + n)", "products / r² (m + n)", "products / m n"]
    rows, thin = [], r * (m + n)
    for name in OPTIMIZERS:
        state, work = costs(name, m, n, r)
        shares = (f"{state / thin:.2f}", f"{work / (r * thin):.1f}", f"{work / (m * n):.2f}")
        rows.append([name, *shares])
    print(markdown.table(heads, rows))
