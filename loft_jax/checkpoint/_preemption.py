"""Preemption notices: the SIGTERM that a cluster sends before it reclaims a machine."""

import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Reports whether the run was asked to stop. Check it after every step.

    In a single-process run, it catches SIGTERM while the context is open, in the main thread only:
    Python delivers signals to no other thread, where `reached` is always False.

    In a multi-process run (after `jax.distributed.initialize`), JAX catches the signal in any
    process and makes all processes stop after the same step. All processes must call `reached`
    after every step.

    Example:
      >>> with Preemption() as preemption:
      ...     for step in range(1, 4):
      ...         if step == 2:
      ...             signal.raise_signal(signal.SIGTERM)
      ...         if preemption.reached(step):
      ...             break  # save, close, and exit
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
        """Returns whether to save and stop after this step.

        Args:
          step: number of updates made.
        """
        if not jax.distributed.is_initialized():
            return self._received
        try:
            return multihost_utils.reached_preemption_sync_point(step)
        except RuntimeError:  # the preemption service is disabled in JAX's options
            return False

    def _receive(self, *_: Any) -> None:
        self._received = True

    def __exit__(self, *_: Any) -> None:
        if self._catches:
            # None is a handler that was not installed from Python. It cannot be reinstalled.
            signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)
