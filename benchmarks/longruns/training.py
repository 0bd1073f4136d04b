"""Runs of a task: one compiled program for all learning rates and seeds of a method."""

import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.longruns.methods import METHODS, renewal_of, warmup_cosine
from benchmarks.longruns.tasks import Batches, Problem
from benchmarks.longruns.transformer import new_adapters
from examples.common.errors import UserError

PRETRAINING_RATE = 3e-3
EVALUATIONS = 6
"""Test losses along a run, about evenly spaced."""

Loss = Callable[..., jax.Array]
"""Of a `Problem`."""


class Programs(NamedTuple):
    """What a run compiles.

    Attributes:
      start: `(pretrained, rate, key) -> trained, state`.
      chunk: `(rate, base, trained, state, batches) -> trained, state` after a step a batch.
      change: `(rate, base, trained, state, key) -> base, trained, state`: the renewal.
    """

    start: Callable[..., Any]
    chunk: Callable[..., Any]
    change: Callable[..., Any]


@functools.cache
def programs(loss: Loss, name: str, rank: int, steps: int) -> Programs:
    """Returns the programs of a method, for any rate and seed."""
    method = METHODS[name]
    optimizer = lambda rate: method.optimizer(warmup_cosine(rate, steps))
    objective = objective_of(loss, method.full, method.scale(rank))
    draw = lambda params, key: new_adapters(key, params, rank, method.magnitude)

    def start(pretrained: Any, rate: jax.Array, key: jax.Array) -> tuple[Any, Any]:
        trained = kernels(pretrained) if method.full else draw(pretrained, key)
        return trained, optimizer(rate).init(trained)

    def chunk(rate: jax.Array, base: Any, trained: Any, state: Any, batches: Batches) -> Any:
        return train(optimizer(rate), objective, base, trained, state, batches)

    def change(rate: jax.Array, base: Any, trained: Any, state: Any, key: jax.Array) -> Any:
        renew = renewal_of(method, functools.partial(draw, base), optimizer(rate))
        return tuple(renew(base, trained, state, key))

    return Programs(*map(jax.jit, (start, chunk, change)))


def fine_tune(
    pretrained: Any, problem: Problem, name: str, rank: int, rate: float, seed: int, steps: int
) -> dict[str, Any]:
    """Returns the results of a run.

    Returns:
      `loss` and `validation`, the mean losses, None where not finite; `accuracy` on the test data,
      where the problem has one; `curve`, test losses by step; `seconds`, the processor time of a
      step: the median over the run, with the renewals.
    """
    method, run = METHODS[name], programs(problem.loss, name, rank, steps)
    key, of_start = jax.random.split(jax.random.key(seed))
    eta = jnp.asarray(rate, jnp.float32)
    base, (trained, state) = pretrained, run.start(pretrained, eta, of_start)
    spacing = max(steps // EVALUATIONS, 1)
    interval = method.interval or spacing
    curve, seconds, loss = [], [], math.nan
    evaluate = lambda of, batches: mean(
        of, *parts(method.full, base, trained), batches, method.scale(rank)
    )
    for begin in range(0, steps, interval):
        end = min(begin + interval, steps)
        batches = problem.batches(np.random.default_rng([seed, begin]), end - begin)
        clock = time.process_time()
        trained, state = run.chunk(eta, base, trained, state, batches)
        if method.interval and end < steps:
            key, used = jax.random.split(key)
            base, trained, state = run.change(eta, base, trained, state, used)
        jax.block_until_ready(trained)
        seconds.append((time.process_time() - clock) / (end - begin))
        if end % spacing < end - begin or end == steps:
            loss = evaluate(problem.loss, problem.test)
            curve.append([end, round(loss, 5)])
            if not math.isfinite(loss):
                return {"loss": None, "validation": None, "curve": curve[:-1], "seconds": None}
    found = {"loss": loss, "validation": evaluate(problem.loss, problem.validation)}
    if problem.accuracy is not None:
        found["accuracy"] = evaluate(problem.accuracy, problem.test)
    rounded = {name: round(x, 5) for name, x in found.items()}
    return rounded | {"curve": curve, "seconds": round(float(np.median(seconds)), 5)}


def train(tx: optax.GradientTransformation, objective: Callable[..., jax.Array], base: Any,
          trained: Any, state: Any, batches: Batches) -> tuple[Any, Any]:  # fmt: skip
    """A step for each batch."""

    def step(carry: Any, batch: Any) -> tuple[Any, None]:
        trained, state = carry
        gradients = jax.grad(objective)(trained, base, batch)
        updates, state = tx.update(gradients, state, trained)
        return (optax.apply_updates(trained, updates), state), None

    return jax.lax.scan(step, (trained, state), batches)[0]


def objective_of(loss: Loss, full: bool, scale: float = 1.0) -> Callable[..., jax.Array]:
    """Returns `(trained, base, batch) ->` the loss, of kernels or of adapters."""
    return lambda trained, base, batch: loss(*parts(full, base, trained), batch, scale)


def kernels(params: Any) -> Any:
    """The part of the parameters that full fine-tuning trains here."""
    layers = params["layers"]
    return {"layers": {name: x for name, x in layers.items() if isinstance(x, dict)}}


def parts(full: bool, base: Any, trained: Any) -> tuple[Any, Any]:
    """Returns parameters and adapters."""
    if not full:
        return base, trained
    return {**base, "layers": {**base["layers"], **trained["layers"]}}, None


def mean(of: Loss, params: Any, adapters: Any, batches: Batches, scale: float = 1.0) -> float:
    """The mean over batches of a problem's loss or accuracy."""
    return float(_mean(of, params, adapters, batches, scale))


@functools.partial(jax.jit, static_argnums=(0, 4))
def _mean(of: Loss, params: Any, adapters: Any, batches: Batches, scale: float) -> jax.Array:
    return jnp.mean(jax.lax.map(lambda batch: of(params, adapters, batch, scale), batches))


def pretrain(problem: Problem, cache: Path, steps: int, rate: float) -> Any:
    """Returns the model after its first training, from the cache if it is there."""
    params = problem.init(jax.random.key(1))
    leaves, treedef = jax.tree.flatten(params)
    if cache.exists():
        with np.load(cache) as file:
            found = [jnp.asarray(file[name]) for name in file]
        if [x.shape for x in found] != [x.shape for x in leaves]:
            raise UserError(f"{cache} holds another model. Give another --cache.")
        return treedef.unflatten(found)
    tx = optax.adamw(warmup_cosine(rate, steps), weight_decay=0.0)
    objective = lambda params, _, batch: problem.loss(params, None, batch)
    chunk = jax.jit(functools.partial(train, tx, objective, None))
    state, rng, draw = tx.init(params), np.random.default_rng(1), problem.pretraining()
    for begin in range(0, steps, 500):
        count = min(500, steps - begin)
        params, state = chunk(params, state, draw(rng, count))
        print(f"pretraining, step {begin + count}", flush=True)
    np.savez(cache, *jax.tree.leaves(params))
    return params
