"""Matrix sensing with a target of rank above the adapter's: a laboratory for renewals.

    python -m benchmarks.longruns sensing

A linear map `W` (48 x 48) is fitted to a target of rank 24, whose singular values fall from 6 to
0.3, from noisy measurements of 16 random inputs a step, with an adapter of rank 4 that starts from
zero, or `W` itself. 600 steps, a cosine schedule, five seeds. The figure is the distance to the
target relative to its norm, both weighted by the inputs' covariance, at the best of the rates.
"""

import argparse
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import markdown, records
from benchmarks.command_line import add_results
from benchmarks.longruns.methods import METHODS, Method, renewal_of, warmup_cosine
from benchmarks.longruns.transformer import adapted
from loft_jax.baselines import dora_init

SIZE, TARGET_RANK, RANK, STEPS, BATCH, NOISE = 48, 24, 4, 600, 16, 0.3
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
SEEDS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", choices=METHODS, nargs="+", default=list(METHODS))
    add_results(parser)


def run(options: argparse.Namespace) -> None:
    lines = []
    for name in options.method:
        begin = time.perf_counter()
        errors = measure(METHODS[name])
        seconds = time.perf_counter() - begin
        best = int(np.nanargmin(errors.mean(axis=1)))
        of_best = errors[best]
        label, spread = METHODS[name].label, of_best.std(ddof=1)
        lines.append([label, f"{of_best.mean():.3f} ± {spread:.3f}", f"{RATES[best]:g}"])
        print(*lines[-1], f"{seconds:.0f} s", flush=True)
        row = {"method": name, "rates": RATES, "errors": errors.astype(float).round(5).tolist()}
        records.append(options.results, [row])
    print(markdown.table(["method", "error", "rate"], lines))


def measure(method: Method) -> np.ndarray:
    """Returns the errors, `(rates, seeds)`."""
    rng = np.random.default_rng(0)
    orthonormal = lambda: np.linalg.qr(rng.normal(size=(SIZE, TARGET_RANK)))[0]
    values = np.geomspace(6, 0.3, TARGET_RANK)
    target = jnp.asarray(orthonormal() * values @ orthonormal().T, jnp.float32)
    deviations = jnp.asarray(np.geomspace(1, 0.2, SIZE) ** 0.5, jnp.float32)
    fit = functools.partial(_fit, method, target, deviations)
    over_all = jax.jit(jax.vmap(jax.vmap(fit, (None, 0)), (0, None)))
    keys = jax.random.split(jax.random.key(1), SEEDS)
    return np.asarray(over_all(jnp.asarray(RATES), keys))


def _fit(
    method: Method, target: jax.Array, deviations: jax.Array, rate: jax.Array, key: jax.Array
) -> jax.Array:
    """Returns the error of one run."""
    tx = method.optimizer(warmup_cosine(rate, STEPS))
    of_start, key = jax.random.split(key)

    # A weight of zero has no direction, so DoRA starts elsewhere, equally far from its target.
    kernel = _elsewhere(target) if method.magnitude else jnp.zeros_like(target)
    target = target + kernel
    distance = jnp.linalg.norm(deviations[:, None] * (target - kernel))

    def draw(key: jax.Array) -> Any:
        a = jax.random.normal(key, (SIZE, RANK)) / SIZE**0.5
        factors = {"lora_a": a, "lora_b": jnp.zeros((RANK, SIZE))}
        return factors | ({"lora_magnitude": dora_init(kernel)} if method.magnitude else {})

    trained = kernel if method.full else draw(of_start)
    identity, scale = jnp.eye(SIZE), method.scale(RANK)
    weight = lambda base, trained: (
        trained if method.full else adapted(identity, base["kernel"], trained, scale)
    )
    change = renewal_of(method, draw, tx)

    def step(carry: Any, item: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        (base, trained, state), (k, key) = carry, item
        of_inputs, of_noise, of_renewal = jax.random.split(key, 3)
        x = jax.random.normal(of_inputs, (BATCH, SIZE)) * deviations
        y = x @ target + NOISE * jax.random.normal(of_noise, (BATCH, SIZE))
        loss = lambda trained: jnp.sum((x @ weight(base, trained) - y) ** 2) / (2 * BATCH)
        updates, state = tx.update(jax.grad(loss)(trained), state, trained)
        carry = (base, optax.apply_updates(trained, updates), state)
        if method.interval is not None:
            now = ((k + 1) % method.interval == 0) & (k + 1 < STEPS)
            renewed = lambda: tuple(change(base, carry[1], carry[2], of_renewal))
            carry = jax.lax.cond(now, renewed, lambda: carry)
        return carry, None

    start = {"kernel": kernel}, trained, tx.init(trained)
    items = jnp.arange(STEPS), jax.random.split(key, STEPS)
    (base, trained, _), _ = jax.lax.scan(step, start, items)
    difference = deviations[:, None] * (weight(base, trained) - target)
    return jnp.linalg.norm(difference) / distance


def _elsewhere(target: jax.Array) -> jax.Array:
    """A random weight of the target's norm."""
    weight = jax.random.normal(jax.random.key(2), target.shape)
    return weight * jnp.linalg.norm(target) / jnp.linalg.norm(weight)
