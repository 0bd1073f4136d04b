"""Which checkpoints are kept: the newest, and the best by a metric."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import orbax.checkpoint as ocp

from loft_jax.checkpoint import _folder, _processes
from loft_jax.checkpoint._record import NotWhole, Record, parse


class Kept(ocp.checkpoint_managers.PreservationPolicy):
    """Says what to keep; Orbax asks when a save is begun, and deletes once that save is whole."""

    def __init__(self, folder: Path, keep: int, best: str | None, mode: Literal["min", "max"]):
        self._folder, self._keep = folder, keep
        self._metric, self._sign = best, 1 if mode == "min" else -1
        # Smaller is better; None if the step has no such metric.
        self._scores: dict[int, float | None] = {}
        self._unread: set[int] = set()

    def add(self, record: Record) -> None:
        """Takes note of a checkpoint that is about to be saved."""
        value = record.metrics.get(self._metric or "", math.nan)
        self._scores[record.step] = None if math.isnan(value) else self._sign * value

    def remove(self, step: int | None) -> None:
        """Forgets a checkpoint that is no more."""
        self._scores.pop(-1 if step is None else step, None)
        self._unread.discard(-1 if step is None else step)

    def best_of(self, steps: Sequence[int]) -> int | None:
        """The best of some steps, the first of equals; None if none has the metric."""
        if self._metric is None:
            return None
        for step in steps:
            if step not in self._scores:  # of an earlier process
                read = lambda step=step: _folder.record_text(self._folder, step)
                try:
                    self.add(parse(_processes.on_first_process(read) or "", step))
                except (NotWhole, ValueError, OSError):
                    self._unread.add(step)  # it may be readable next time
                else:
                    self._unread.discard(step)
        scores = ((self._scores.get(step), step) for step in steps)
        ranked = [(score, step) for score, step in scores if score is not None]
        return min(ranked)[1] if ranked else None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """As Orbax asks it."""
        steps = sorted(checkpoint.step for checkpoint in checkpoints)
        # What could not be read may be the best, or of a later version: `restore` will tell.
        kept = {*steps[-self._keep :], self.best_of(steps), *self._unread}
        return [checkpoint.step in kept for checkpoint in checkpoints]
