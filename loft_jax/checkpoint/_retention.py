"""Which checkpoints to keep: the newest, and the best by a metric."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from loft_jax.checkpoint import _folder, _processes
from loft_jax.checkpoint._record import Damaged, Record, parse


class Retention:
    """Which checkpoints are kept.

    Orbax's own ``LatestN`` and ``BestN`` read metrics from files without a checksum. This policy
    reads them from the record, and keeps checkpoints whose record it cannot read.
    """

    def __init__(self, folder: Path, keep: int, best: str | None, mode: Literal["min", "max"]):
        self._folder, self._keep = folder, keep
        self._metric, self._sign = best, 1 if mode == "min" else -1
        # Smaller is better; None if the step does not have the metric.
        self._scores: dict[int, float | None] = {}
        self._unread: set[int] = set()

    def add(self, record: Record) -> None:
        """Registers a checkpoint that is about to be saved."""
        value = record.metrics.get(self._metric or "", math.nan)
        self._scores[record.step] = None if math.isnan(value) else self._sign * value

    def remove(self, step: int | None) -> None:
        """Forgets a checkpoint that does not exist anymore."""
        self._scores.pop(-1 if step is None else step, None)
        self._unread.discard(-1 if step is None else step)

    def best_of(self, steps: Sequence[int]) -> int | None:
        """Returns the best step, the first of equals; None if none has the metric."""
        if self._metric is None:
            return None
        for step in steps:
            if step not in self._scores:  # saved by an earlier process
                read = lambda step=step: _folder.record_text(self._folder, step)
                try:
                    self.add(parse(_processes.on_first_process(read) or "", step))
                except (Damaged, ValueError, OSError):
                    self._unread.add(step)  # it may be readable later
                else:
                    self._unread.discard(step)
        scores = ((self._scores.get(step), step) for step in steps)
        ranked = [(score, step) for score, step in scores if score is not None]
        return min(ranked)[1] if ranked else None

    def obsolete(self, steps: Sequence[int]) -> list[int]:
        """Returns which of the saved steps to delete."""
        # An unreadable one may be the best, or of a later version; `restore` reports it.
        kept = {*sorted(steps)[-self._keep :], self.best_of(steps), *self._unread}
        return [step for step in steps if step not in kept]
