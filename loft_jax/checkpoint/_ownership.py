"""The right of one run to write to its folder, which is created, locked and kept clear."""

import weakref
from pathlib import Path

from loft_jax.checkpoint import _folder, _processes
from loft_jax.checkpoint._errors import CheckpointError
from loft_jax.checkpoint._lock import Lock


class Ownership:
    """The right to write to a folder, which process 0 holds for all processes of a run.

    Args:
      folder: the folder of the run; need not exist.
      take_over: take the lock from another run without asking whether it is alive.
    """

    def __init__(self, folder: Path, take_over: bool):
        self._folder, self._take_over = folder, take_over
        self._lock: Lock | None = None

    def claim(self) -> list[str]:
        """Creates the folder and takes its lock if needed, and deletes unfinished saves.

        Returns:
          What could not be deleted, one line each.

        Raises:
          CheckpointError: another run holds the lock, or the folder cannot be written to.
        """
        try:
            _processes.on_first_process(lambda: _folder.make(self._folder))
            if _processes.on_first_process(lambda: self._lock is None):
                holder = _processes.on_first_process(self._acquire)
                if holder is not None:
                    raise CheckpointError(
                        f"{self._folder} is in use by {holder}, and only one run may write to a "
                        "folder. Use another folder, open this one with read_only=True, or, if "
                        "that run is dead for certain, with take_over=True."
                    )
            elif (holder := _processes.on_first_process(self._lost_to)) is not None:
                raise _lost(self._folder, holder)
            return _processes.on_first_process(lambda: _folder.clear_unfinished(self._folder))
        except OSError as error:
            raise CheckpointError(
                f"Cannot write checkpoints to {self._folder} ({error}). Use a writable folder, or "
                "open this one with read_only=True."
            ) from error

    def check(self) -> None:
        """Raises `CheckpointError` in process 0 if another run has taken the folder over."""
        if (holder := self._lost_to()) is not None:
            raise _lost(self._folder, holder)

    def release(self) -> None:
        """Releases the lock. `claim` takes it again."""
        if self._lock is not None:
            self._lock.release()
        self._lock = None

    def _acquire(self) -> str | None:
        lock = Lock(self._folder)
        holder = lock.acquire(self._take_over)
        if holder is None:
            self._lock = lock
            weakref.finalize(self, lock.release)  # also at the end of the program
        return holder

    def _lost_to(self) -> str | None:
        return None if self._lock is None else self._lock.lost_to()


def _lost(folder: Path, holder: str) -> CheckpointError:
    return CheckpointError(
        f"{folder} was taken over by {holder}, and this run may not write to it anymore. Stop one "
        "of the two."
    )
