"""Runs of the language model: one compiled program for all learning rates and seeds of a method."""

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

from benchmarks.longruns import model
from benchmarks.longruns.data import Texts, held_out, windows
from benchmarks.longruns.methods import METHODS, renewal_of, warmup_cosine
from examples.common.errors import UserError

PRETRAINING_STEPS, PRETRAINING_RATE = 4000, 3e-3
EVALUATIONS = 6
"""Test losses along a run, about evenly spaced."""


class Sizes(NamedTuple):
    """The size of the model and of a run."""

    steps: int = 1500
    layers: int = 2
    width: int = 128
    length: int = 64
    batch: int = 8


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
def programs(name: str, rank: int, steps: int) -> Programs:
    """Returns the programs of a method, for any rate and seed."""
    method = METHODS[name]
    optimizer = lambda rate: method.optimizer(warmup_cosine(rate, steps))
    objective = loss_of_kernels if method.full else loss_of_adapters
    draw = lambda params, key: model.new_adapters(key, params, rank)

    def start(pretrained: Any, rate: jax.Array, key: jax.Array) -> tuple[Any, Any]:
        trained = kernels(pretrained) if method.full else draw(pretrained, key)
        return trained, optimizer(rate).init(trained)

    def chunk(rate: jax.Array, base: Any, trained: Any, state: Any, batches: jax.Array) -> Any:
        return train(optimizer(rate), objective, base, trained, state, batches)

    def change(rate: jax.Array, base: Any, trained: Any, state: Any, key: jax.Array) -> Any:
        renew = renewal_of(method, functools.partial(draw, base), optimizer(rate))
        return tuple(renew(base, trained, state, key))

    return Programs(*map(jax.jit, (start, chunk, change)))


def fine_tune(
    pretrained: Any, texts: Texts, name: str, rank: int, rate: float, seed: int, sizes: Sizes
) -> dict[str, Any]:
    """Returns the results of a run.

    Returns:
      `loss` and `validation`, in nats a byte, None where not finite; `curve`, test losses by step;
      `seconds`, the processor time of a step: the median over the run, with the renewals.
    """
    method, steps, shape = METHODS[name], sizes.steps, (sizes.batch, sizes.length)
    run = programs(name, rank, steps)
    key, of_start = jax.random.split(jax.random.key(seed))
    eta = jnp.asarray(rate, jnp.float32)
    base, (trained, state) = pretrained, run.start(pretrained, eta, of_start)
    validation, test = (held_out(text, *shape) for text in texts[1:])
    spacing = max(steps // EVALUATIONS, 1)
    interval = method.interval or spacing
    curve, seconds, loss = [], [], math.nan
    for begin in range(0, steps, interval):
        end = min(begin + interval, steps)
        rng = np.random.default_rng([seed, begin])
        batches = windows(texts.train, rng, end - begin, *shape)
        clock = time.process_time()
        trained, state = run.chunk(eta, base, trained, state, batches)
        if method.interval and end < steps:
            key, used = jax.random.split(key)
            base, trained, state = run.change(eta, base, trained, state, used)
        jax.block_until_ready(trained)
        seconds.append((time.process_time() - clock) / (end - begin))
        if end % spacing < end - begin or end == steps:
            loss = mean_loss(*parts(method.full, base, trained), test)
            curve.append([end, round(loss, 5)])
            if not math.isfinite(loss):
                return {"loss": None, "validation": None, "curve": curve[:-1], "seconds": None}
    return {
        "loss": round(loss, 5),
        "validation": round(mean_loss(*parts(method.full, base, trained), validation), 5),
        "curve": curve,
        "seconds": round(float(np.median(seconds)), 5),
    }


def train(tx: optax.GradientTransformation, objective: Callable[..., jax.Array], base: Any,
          trained: Any, state: Any, batches: jax.Array) -> tuple[Any, Any]:  # fmt: skip
    """A step for each batch."""

    def step(carry: Any, batch: jax.Array) -> tuple[Any, None]:
        trained, state = carry
        gradients = jax.grad(objective)(trained, base, batch)
        updates, state = tx.update(gradients, state, trained)
        return (optax.apply_updates(trained, updates), state), None

    return jax.lax.scan(step, (trained, state), batches)[0]


def loss_of_adapters(adapters: Any, base: Any, batch: jax.Array) -> jax.Array:
    return model.loss(base, adapters, batch)


def loss_of_kernels(trained: Any, base: Any, batch: jax.Array) -> jax.Array:
    return model.loss(parts(True, base, trained)[0], None, batch)


def kernels(params: Any) -> Any:
    """The part of the parameters that full fine-tuning trains here."""
    layers = params["layers"]
    return {"layers": {name: x for name, x in layers.items() if isinstance(x, dict)}}


def parts(full: bool, base: Any, trained: Any) -> tuple[Any, Any]:
    """Returns parameters and adapters."""
    if not full:
        return base, trained
    return {**base, "layers": {**base["layers"], **trained["layers"]}}, None


def mean_loss(params: Any, adapters: Any, batches: jax.Array) -> float:
    return float(_mean_loss(params, adapters, batches))


@jax.jit
def _mean_loss(params: Any, adapters: Any, batches: jax.Array) -> jax.Array:
    return jnp.mean(jax.lax.map(lambda batch: model.loss(params, adapters, batch), batches))


def pretrain(text: Callable[[], np.ndarray], cache: Path, sizes: Sizes, steps: int) -> Any:
    """Returns the model trained on a text, from the cache if it is there."""
    params = model.init(jax.random.key(1), sizes.layers, sizes.width, sizes.length)
    leaves, treedef = jax.tree.flatten(params)
    if cache.exists():
        with np.load(cache) as file:
            found = [jnp.asarray(file[f"arr_{k}"]) for k in range(len(leaves))]
        if [x.shape for x in found] != [x.shape for x in leaves]:
            raise UserError(f"{cache} holds another model. Give another --cache.")
        return treedef.unflatten(found)
    tx = optax.adamw(warmup_cosine(PRETRAINING_RATE, steps), weight_decay=0.0)
    objective = lambda params, _, batch: model.loss(params, None, batch)
    chunk = jax.jit(functools.partial(train, tx, objective, None))
    state, rng, read = tx.init(params), np.random.default_rng(1), text()
    for begin in range(0, steps, 500):
        count = min(500, steps - begin)
        batches = windows(read, rng, count, sizes.batch, sizes.length)
        params, state = chunk(params, state, batches)
        print(f"pretraining, step {begin + count}", flush=True)
    np.savez(cache, *jax.tree.leaves(params))
    return params
