"""The training loop: progress, metrics, evaluation, checkpoints, and an orderly stop."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from loft_jax.checkpoint import Preemption

from .batches import batches
from .errors import Preempted
from .progress import Clock, clock_time, multiples
from .runs import Run
from .settings import Settings
from .tasks import Task
from .training import Trainer, TrainState


def say(*values: Any, **options: Any) -> None:
    """Prints in the first process of a run, without breaking the progress bar."""
    if jax.process_index() == 0:
        tqdm.write(" ".join(map(str, values)), **options)


def fit(
    settings: Settings,
    run: Run,
    trainer: Trainer,
    state: TrainState,
    task: Task,
    *,
    resume: bool,
    afterwards: float = 0.0,
) -> TrainState:
    """Trains to the last step and evaluates on the way.

    Args:
        settings: number of steps, peak learning rate, intervals of evaluations and checkpoints.
        run: receives metrics and checkpoints.
        trainer: the compiled functions.
        state: before the first step.
        task: data and metrics.
        resume: whether to start from the newest checkpoint of the run instead of from `state`.
        afterwards: the seconds that the run will take after the last step, for the time left.

    Raises:
        Preempted, KeyboardInterrupt: SIGTERM or Ctrl-C stopped the run. The state after the
            current step is saved, and the user knows how to resume.
    """
    clock = Clock()
    if resume:
        state = run.restore(state)
        say(f"resuming after step {int(state.step)} of {settings.steps}")
    else:
        with clock.measure("evaluation"):
            evaluate(settings, run, trainer, state, task)
    first, units = int(state.step), settings.batch_size * task.units
    steps = batches(task.train, settings.batch_size, settings.seed, range(first, settings.steps))
    bar = tqdm(
        initial=first,
        total=settings.steps,
        unit="step",
        desc=settings.method,
        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        disable=jax.process_index() > 0,
    )
    try:
        with bar, Preemption() as preemption, interrupt_as_preemption() as interrupted:
            for done, batch in enumerate(steps, start=first + 1):
                learning_rate = settings.learning_rate_at(done - 1)
                with clock.measure("step") as measured:
                    state, loss = trainer.step(state, batch, learning_rate)
                    loss = float(loss)
                speed = units / measured.seconds
                record = {"step": done, "loss": loss, "learning_rate": learning_rate}
                run.log(record | {f"{task.unit}_per_second": speed})
                left = clock.left(
                    step=settings.steps - done,
                    evaluation=multiples(settings.eval_every, done - 1, settings.steps),
                    checkpoint=multiples(settings.save_every, done - 1, settings.steps),
                )
                shown = {
                    "left": clock_time(left + afterwards),
                    "loss": f"{loss:.3f}",
                    "lr": f"{learning_rate:.1e}",
                    f"{task.unit}/s": f"{speed:.0f}",
                }
                bar.set_postfix(shown, refresh=False)
                bar.update()
                last, stop = done == settings.steps, preemption.reached(done)
                metrics = None
                if done % settings.eval_every == 0 or last:
                    with clock.measure("evaluation"):
                        metrics = evaluate(settings, run, trainer, state, task)
                if done % settings.save_every == 0 or last or stop:
                    with clock.measure("checkpoint"):
                        run.save(state, metrics)
                if stop and not last:
                    run.wait()  # so that what the user is told below is true
                    raise KeyboardInterrupt if interrupted.is_set() else Preempted
                if last:
                    bar.set_postfix(shown | {"left": clock_time(afterwards)})
    except (KeyboardInterrupt, Preempted) as stopped:
        why = "preempted" if isinstance(stopped, Preempted) else "stopped"
        again = f"continue with --resume --output {run.resumable}"
        remedy = again
        if not run.has_checkpoint():
            again = "start again" if run.resumable == run.folder else again
            remedy = f"there is no checkpoint yet, so delete {run.folder} and {again}"
        say(f"\n{why}; {remedy}", file=sys.stderr)
        raise
    if settings.steps > first:
        say(
            f"{settings.steps - first} steps of {clock.typical('step'):.2f} s; "
            f"{clock_time(clock.total('evaluation'))} in evaluations, "
            f"{clock_time(clock.compilation())} in compilation"
        )
    return state


@contextlib.contextmanager
def interrupt_as_preemption() -> Iterator[threading.Event]:
    """Turns Ctrl-C into SIGTERM, so that all processes of a run stop after the same step.

    A second Ctrl-C stops the process at once.

    Yields:
        An event that is set after the first Ctrl-C in this process.
    """
    interrupted = threading.Event()

    def interrupt(*_: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupted.set()
        say("\nsaving after this step; press Ctrl-C again to stop at once", file=sys.stderr)
        signal.raise_signal(signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():  # cannot handle signals
        yield interrupted
        return
    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


def evaluate(
    settings: Settings, run: Run, trainer: Trainer, state: TrainState, task: Task
) -> dict[str, float]:
    """Logs and prints the metrics on the held-out data; returns `eval_loss`."""
    size = settings.batch_size // settings.accumulate
    metrics = task.metrics(trainer.evaluate(state.params, task.held_out, size))
    run.log({"step": int(state.step)} | metrics)
    say(f"step {int(state.step)}: {task.sentence(metrics)}")
    return {"eval_loss": metrics["eval_loss"]}


def report(settings: Settings, run: Run, task: Task, title: str) -> None:
    """Draws the learning curve and prints the outcome, from the logged metrics."""
    records = run.records()
    task.draw(records, run.folder / "curve.png", title)
    evaluated = [task.sentence(record) for record in records if "eval_loss" in record]
    speeds = [r[name] for r in records if (name := f"{task.unit}_per_second") in r]
    print(
        f"\nbefore: {evaluated[0]}\nafter {settings.steps} steps: {evaluated[-1]} "
        f"({np.median(speeds):.0f} {task.unit}/s)"
    )
    print(f"results in {run.folder}: {', '.join(sorted(p.name for p in run.folder.iterdir()))}")
