"""Notice of preemption: the SIGTERM that a cluster sends before it takes a machine away."""

import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Turns SIGTERM into a question that the training loop asks after each step.

    In one process it catches the signal while it is open. In a run of several (after
    `jax.distributed.initialize`) JAX catches it, in whichever process it arrives, and all processes
    are told to stop after the same step; there, ask in all of them after every step.

    In a run of one process it never reports one outside of the main thread, where Python takes no
    signals.

    Example:
      >>> with Preemption() as preemption:
      ...     for step in range(1, 4):
      ...         if step == 2:
      ...             signal.raise_signal(signal.SIGTERM)
      ...         if preemption.reached(step):
      ...             break  # save, close, and end the program
      >>> step
      2
    """

    def __init__(self) -> None:
        self._received = False
        self._previous: Any = None
        self._catches = False

    def __enter__(self) -> "Preemption":
        distributed = jax.distributed.is_initialized()
        self._catches = not distributed and threading.current_thread() is threading.main_thread()
        if self._catches:
            self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def reached(self, step: int) -> bool:
        """Whether the run is to save and end after this step."""
        if not jax.distributed.is_initialized():
            return self._received
        try:
            return multihost_utils.reached_preemption_sync_point(step)
        except RuntimeError:  # switched off by JAX's own option
            return False

    def _receive(self, *_: Any) -> None:
        self._received = True

    def __exit__(self, *_: Any) -> None:
        if self._catches:
            # None is a handler that was not installed from Python, and cannot be put back.
            signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)
