"""Training runs; all runs of a cell share one compiled step."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.accuracy import provenance
from benchmarks.accuracy.config import Cell, Task
from benchmarks.accuracy.gradient_init import lora_ga
from benchmarks.accuracy.store import rounded
from benchmarks.accuracy.variants import (
    VARIANTS,
    adapted,
    make_optimizer,
    quantized,
    rule_of,
    trained_by,
)
from benchmarks.accuracy.workloads import Split, Workload
from examples.common import batches
from examples.common.models.stacking import STACKED
from examples.common.schedules import learning_rate_at
from examples.common.training import Trainer, TrainState

MakeRun = Callable[[float | None, int], dict[str, Any]]
"""(learning rate, seed) -> the record of the run."""


def open_cell(task: Task, workload: Workload, cell: Cell) -> MakeRun:
    """Builds the training step of a cell, and returns the function that makes its runs."""
    variant, rank = VARIANTS[cell.method], cell.rank or 1
    rule = rule_of(variant, workload.rule, rank)
    base = quantized(variant, workload.base(0), STACKED)
    wrt = trained_by(variant, workload.head)

    def optimizer(learning_rate: Any) -> optax.GradientTransformation:
        head = (workload.head, head_schedule(task))
        return make_optimizer(variant, learning_rate, rule, task.max_norm, *head)

    def model_of(seed: int) -> Any:
        # The base depends on the seed only through a new head.
        of_seed = base if workload.head is None else workload.base(seed)
        return adapted(variant, of_seed, rule, seed)

    trainer = Trainer(model_of(0), workload.loss, optimizer, wrt, workload.outputs)

    def make(rate: float | None, seed: int) -> dict[str, Any]:
        provenance.reset_peak_memory()
        began = time.perf_counter()
        model = model_of(seed)
        if variant.from_gradient:
            batch = batches.batch_at(workload.train, task.batch_size, seed, 0)
            model = lora_ga(model, workload.loss, batch, rule)
            trainer.frozen = nnx.as_pure(nnx.state(model, nnx.Not(wrt)))
        if rate is None:
            params = nnx.as_pure(nnx.state(model, wrt))
            found = {
                "steps_made": 0,
                "train_losses": [],
                **measured(task, workload, trainer, params),
            }
        else:
            found = train(task, workload, trainer, trainer.start(model), rate, seed)
        return {
            "label": variant.label,
            "settings": task.settings(),
            **found,
            "seconds": round(time.perf_counter() - began, 1),
            "peak_memory_bytes": provenance.peak_memory(),
            **provenance.origin(),
        }

    return make


def head_schedule(task: Task) -> optax.Schedule | None:
    """The learning rate of a new head by step, the same for all methods and rates."""
    if task.head_rate is None:
        return None
    rates = [learning_rate_at(step, task.steps, task.head_rate) for step in range(task.steps)]
    return lambda step: jnp.array(rates, jnp.float32)[step]


def train(
    task: Task, workload: Workload, trainer: Trainer, state: TrainState, rate: float, seed: int
) -> dict[str, Any]:
    """Trains and evaluates; the run ends early if its loss is not finite."""
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    optimizer_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
    losses, seconds = [], []
    for step, batch in enumerate(
        batches.batches(workload.train, task.batch_size, seed, range(task.steps))
    ):
        began = time.perf_counter()
        state, loss = trainer.step(state, batch, learning_rate_at(step, task.steps, rate))
        losses.append(float(loss))
        seconds.append(time.perf_counter() - began)
        if not math.isfinite(losses[-1]):
            break
    return {
        "steps_made": len(losses),
        "train_losses": [rounded(loss, 4) for loss in losses],
        **measured(task, workload, trainer, state.params, finite=math.isfinite(losses[-1])),
        "step_seconds": round(statistics.median(seconds), 4),
        "trained_parameters": trained,
        "optimizer_state_bytes": optimizer_bytes,
    }


def measured(
    task: Task, workload: Workload, trainer: Trainer, params: Any, finite: bool = True
) -> dict[str, Any]:
    """The metrics on both splits; None for a run that diverged."""

    def of(split: Split) -> dict[str, Any] | None:
        outputs = trainer.evaluate(params, split.examples, task.batch_size)
        metrics = workload.metrics(split, outputs)
        if not math.isfinite(metrics["loss"]):
            return None
        return {name: rounded(x) for name, x in metrics.items()} | {"examples": split.count}

    splits = {"validation": workload.validation, "test": workload.test}
    found = {name: of(split) if finite else None for name, split in splits.items()}
    return {"finite": None not in found.values(), **found}
