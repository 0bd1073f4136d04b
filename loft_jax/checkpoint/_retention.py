"""Which checkpoints to keep: the newest, every so many steps, and the best by a metric."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from loft_jax.checkpoint import _folder, _processes
from loft_jax.checkpoint._errors import UndeletedCheckpointWarning, listing
from loft_jax.checkpoint._record import Damaged, parse


class Retention:
    """Which checkpoints are kept.

    Orbax's ``LatestN``, ``EveryNSteps`` and ``BestN`` belong to its manager and read metrics from
    files without a checksum. This policy reads them from the record, and keeps checkpoints whose
    record it cannot read.

    Args:
      folder: the folder of the run.
      keep: number of newest checkpoints.
      keep_every: steps that are multiples of this are kept in addition; None keeps none of them.
      best: name of the metric whose best value is kept in addition; None keeps none.
      mode: whether the smallest ("min") or the largest ("max") value is best.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        keep_every: int | None,
        best: str | None,
        mode: Literal["min", "max"],
    ):
        self._folder, self._keep, self._keep_every = folder, keep, keep_every
        self._metric, self._sign = best, 1 if mode == "min" else -1
        # Smaller is better; None if the step does not have the metric.
        self._scores: dict[int, float | None] = {}
        self._unread: set[int] = set()

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Registers a checkpoint that is about to be saved."""
        value = metrics.get(self._metric or "", math.nan)
        self._scores[step] = None if math.isnan(value) else self._sign * value

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
                    record = parse(_processes.on_first_process(read) or "", step)
                except (Damaged, ValueError, OSError):
                    self._unread.add(step)  # it may be readable later
                else:
                    self.add(step, record.metrics)
                    self._unread.discard(step)
        scores = ((self._scores.get(step), step) for step in steps)
        ranked = [(score, step) for score, step in scores if score is not None]
        return min(ranked)[1] if ranked else None

    def obsolete(self, steps: Sequence[int]) -> list[int]:
        """Returns which of the saved steps to delete."""
        # An unreadable one may be the best, or of a later version; `restore` reports it.
        kept = {*sorted(steps)[-self._keep :], self.best_of(steps), *self._unread}
        if self._keep_every is not None:
            kept |= {step for step in steps if step % self._keep_every == 0}
        return [step for step in steps if step not in kept]

    def delete_obsolete(self) -> list[str]:
        """Deletes the checkpoints that are not kept. Returns the failures, one line each."""
        try:
            steps = _processes.on_first_process(lambda: _folder.steps(self._folder))
            obsolete = self.obsolete(steps)
            return _processes.on_first_process(lambda: _folder.delete(self._folder, obsolete))
        except OSError as error:
            return [str(error)]


def warn_of_undeleted(folder: Path, left: Sequence[str], stacklevel: int) -> None:
    """Warns of what could not be deleted, if anything.

    Args:
      folder: the folder of the run.
      left: what is left, one line each.
      stacklevel: as of `warnings.warn`, counted from the caller.
    """
    if left:
        headline = (
            f"{folder}: these could not be deleted and take up space. It is tried again at the "
            "next save. What was saved is complete:"
        )
        message = listing(headline, left)
        warnings.warn(message, UndeletedCheckpointWarning, stacklevel=stacklevel + 1)
