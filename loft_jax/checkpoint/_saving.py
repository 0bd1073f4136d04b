"""One save, written in the background."""

import json
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath  # the paths of Orbax's handlers

from loft_jax.checkpoint import _folder, _processes
from loft_jax.checkpoint._errors import brief
from loft_jax.checkpoint._reading import verify
from loft_jax.checkpoint._record import Record

Arrays = Mapping[str, Mapping[str, Any]]
"""The arrays of each item of a checkpoint, by path."""


class Save:
    """A save that is being written.

    Orbax writes to a folder of its own. When it is complete in all processes, process 0 reads it
    back, flushes it to the disk and renames it to its step. Threads of a failed save may still
    write to its folder, which has no other use.

    Args:
      folder: the folder of the run.
      record: of the checkpoint.
      arrays: not empty; no item is.
      timeout_s: how long to wait for the other processes.
      check: called before the folder is renamed; raises an error to prevent it.
    """

    def __init__(
        self,
        folder: Path,
        record: Record,
        arrays: Arrays,
        timeout_s: int,
        check: Callable[[], None],
    ):
        self.step, self._record, self._check = record.step, record, check
        name = _processes.on_first_process(lambda: _folder.unfinished_name(record.step))
        self._unfinished = folder / name
        self._error: BaseException | None = None
        self._on_host: Arrays | None = None
        meta = record.to_json()  # now: the caller may change the position in the data
        finish: Callable[[], None]
        if jax.process_count() == 1:
            # In the memory of the host nothing can change them, and all of Orbax's work can be done
            # in the background. No copy is made of what is there already: JAX does not reuse a
            # donated buffer that NumPy still refers to.
            on_host = self._on_host = jax.device_get(arrays)
            finish = lambda: _write(self._unfinished, meta, on_host)
        else:
            # Orbax synchronizes the processes over their devices, which training also uses.
            try:
                finish = _begin_together(self._unfinished, meta, arrays, timeout_s)
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
                verify(self._unfinished, self._record, self._on_host)
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


def _write(folder: Path, meta: Mapping[str, Any], arrays: Arrays) -> None:
    """Writes a checkpoint of arrays on the host."""
    for item, leaves in arrays.items():
        (folder / item).mkdir(parents=True)
        # Not a checkpointer: in the background it could collide with a save that the program makes
        # with Orbax at the same time, since Orbax numbers the saves of a process.
        handler = ocp.PyTreeCheckpointHandler()
        try:
            handler.save(epath.Path(folder / item), args=ocp.args.PyTreeSave(dict(leaves)))
            handler.finalize(epath.Path(folder / item))
        finally:
            handler.close()
    (folder / "meta").mkdir(parents=True)
    (folder / "meta" / "metadata").write_text(json.dumps(meta), "utf-8")


def _begin_together(
    folder: Path, meta: Mapping[str, Any], arrays: Arrays, timeout_s: int
) -> Callable[[], None]:
    """Begins to write a checkpoint in all processes, and returns what waits for all of them."""
    checkpointer = ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(),
        # If a folder cannot be created in the background, Orbax's threads wait for it for minutes
        # and keep the program from exiting.
        async_options=ocp.AsyncOptions(
            timeout_secs=timeout_s, create_directories_asynchronously=False
        ),
    )
    parts = {item: ocp.args.PyTreeSave(dict(leaves)) for item, leaves in arrays.items()}
    args = ocp.args.Composite(**parts, meta=ocp.args.JsonSave(meta))
    checkpointer.save(folder, args=args)

    def finish() -> None:
        checkpointer.wait_until_finished()
        checkpointer.close()

    return finish
