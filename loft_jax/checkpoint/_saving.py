"""One save, written in the background."""

import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from loft_jax.checkpoint import _folder, _processes, _storage
from loft_jax.checkpoint._errors import brief
from loft_jax.checkpoint._reading import verify
from loft_jax.checkpoint._record import Record
from loft_jax.checkpoint._storage import Arrays


class Save:
    """A save that is being written.

    Orbax writes to a folder of its own. When it is complete in all processes, process 0 reads it
    back, flushes it to the disk and renames it to its step. Threads of a failed save may still
    write to its folder, which has no other use.

    Args:
      folder: the folder of the run.
      step: of the checkpoint.
      describe: returns the record; it waits for the digests.
      arrays: not empty; no item is.
      timeout_s: how long to wait for the other processes.
      check: called before the folder is renamed; raises an error to prevent it.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        describe: Callable[[], Record],
        arrays: Arrays,
        timeout_s: int,
        check: Callable[[], None],
    ):
        self.step, self._describe, self._check = step, describe, check
        name = _processes.on_first_process(lambda: _folder.unfinished_name(step))
        self._unfinished = folder / name
        self._error: BaseException | None = None
        self._on_host: Arrays | None = None
        if jax.process_count() == 1:
            # In the memory of the host nothing can change them, and Orbax can write them in the
            # background. Only NumPy arrays, which the caller can change, are copied there: JAX does
            # not reuse a donated buffer that NumPy still refers to.
            own = lambda x: x.copy() if isinstance(x, np.ndarray) else x
            on_host = self._on_host = jax.device_get(jax.tree.map(own, arrays))

            def begin() -> Callable[[], None]:
                write = _storage.begin(self._unfinished, on_host)
                # In the background: Python of Orbax's threads would slow it down here.
                return lambda: write(describe().to_json())
        else:
            meta = describe().to_json()

            def begin() -> Callable[[], None]:
                # Orbax synchronizes the processes over their devices, which training also uses.
                return _storage.begin_together(self._unfinished, meta, arrays, timeout_s)

        try:
            finish = begin()
        except Exception as error:  # all processes have to learn of it, when they wait
            self._error, finish = error, lambda: None
        self._thread = threading.Thread(target=self._run, args=(finish,), name="checkpoint save")
        self._thread.start()

    def result(self) -> BaseException | None:
        """Waits until the save is complete, and returns the error that ended it, if any."""
        self._thread.join()
        return self._error

    def _run(self, finish: Callable[[], None]) -> None:
        try:
            finish()
            if self._error is None and jax.process_index() == 0:
                # Orbax may lose arrays without an error, as where a folder cannot be listed.
                verify(self._unfinished, self._describe(), self._on_host)
                self._check()
                _folder.publish(self._unfinished, self.step)
        except BaseException as error:
            self._error = error
            if not threading.main_thread().is_alive():  # nobody will ask
                warnings.warn(
                    f"step {self.step} was not saved, the program has ended: {brief(error)}. Call "
                    "wait() or close() before.",
                    stacklevel=1,
                )
        finally:
            self._on_host = None
