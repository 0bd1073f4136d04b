"""The training loop that the examples share: progress, metrics, evaluation, checkpoints."""

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from errors import Preempted
from runs import Run
from settings import Settings
from tqdm import tqdm
from training import Trainer, TrainState, learning_rate_at

from loft_jax.checkpoint import Preemption

Measure = Callable[[TrainState], dict[str, float]]
"""Evaluates a state, logs and prints what it finds; returns the held-out loss as `eval_loss`."""


def say(*values: Any, **options: Any) -> None:
    """Prints, in the first process of a run."""
    if jax.process_index() == 0:
        tqdm.write(" ".join(map(str, values)), **options)


def fit(
    settings: Settings,
    run: Run,
    trainer: Trainer,
    state: TrainState,
    batches_of: Callable[[range], Iterator[Any]],
    measure: Measure,
    *,
    resume: bool,
    unit: str,
    units: int,
) -> TrainState:
    """Measures and trains from the first step on, or from where the run in its folder stopped.

    Args:
        batches_of: the batches of a range of steps.
        measure: called before the first step, every `eval_every` steps, and after the last.
        unit, units: what a step processes, and how many of it: ("tokens", 512).

    Raises:
        Preempted, KeyboardInterrupt: the run has stopped, and has said how to continue it.
    """
    if resume:
        state = run.restore(state)
        say(f"resuming after step {int(state.step)} of {settings.steps}")
    else:
        measure(state)
    batches = batches_of(range(int(state.step), settings.steps))
    try:
        return _train(settings, run, trainer, state, batches, measure, unit, units)
    except (KeyboardInterrupt, Preempted) as stopped:
        why = "preempted" if isinstance(stopped, Preempted) else "stopped"
        say(f"\n{why}; continue with --resume --output {run.folder}", file=sys.stderr)
        raise


def _train(
    settings: Settings,
    run: Run,
    trainer: Trainer,
    state: TrainState,
    batches: Iterator[Any],
    measure: Measure,
    unit: str,
    units: int,
) -> TrainState:
    first = int(state.step)
    options = {"unit": "step", "desc": settings.method, "disable": jax.process_index() > 0}
    bar = tqdm(batches, initial=first, total=settings.steps, **options)
    with Preemption() as preemption:
        for step, batch in enumerate(bar, start=first):
            began = time.perf_counter()
            rate = learning_rate_at(step, settings.steps, settings.peak)
            state, loss = trainer.step(state, batch, rate)
            loss = float(loss)
            speed = units / (time.perf_counter() - began)
            done = step + 1
            record = {"step": done, "loss": loss, "learning_rate": rate}
            run.log(record | {f"{unit}_per_second": speed})
            shown = {"loss": f"{loss:.3f}", "lr": f"{rate:.1e}", f"{unit}/s": f"{speed:.0f}"}
            bar.set_postfix(shown)
            last, preempted = done == settings.steps, preemption.reached(done)
            metrics = None
            if done % settings.eval_every == 0 or last:
                metrics = measure(state)
            if done % settings.save_every == 0 or last or preempted:
                run.save(state, metrics)
            if preempted and not last:
                raise Preempted
    return state
