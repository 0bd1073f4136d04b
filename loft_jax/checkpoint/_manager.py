"""Opening and closing Orbax's checkpoint manager."""

import contextlib
import threading
import time
from pathlib import Path

import orbax.checkpoint as ocp

from loft_jax.checkpoint import _folder, _processes
from loft_jax.checkpoint._errors import CheckpointError
from loft_jax.checkpoint._retention import Retention


def open_manager(
    folder: Path,
    retention: Retention,
    asynchronous: bool,
    timeout_s: int,
) -> ocp.CheckpointManager:
    """Creates the folder if needed, deletes unfinished saves and returns a manager.

    Raises:
      CheckpointError: the folder cannot be created or is not writable.
    """
    try:
        _processes.on_first_process(lambda: _folder.make(folder))
        _processes.on_first_process(lambda: _folder.clear_unfinished(folder))
        options = ocp.CheckpointManagerOptions(
            create=False,
            # Orbax would delete unfinished saves in the background after this function returns. By
            # then they can be the saves of a run that replaced this one.
            cleanup_tmp_directories=False,
            # Metrics are in our record. Orbax's own metrics files have no checksum.
            lightweight_initialize=True,
            preservation_policy=retention,
            enable_async_checkpointing=asynchronous,
            # If a folder cannot be created in the background, Orbax's threads wait for it for
            # minutes and keep the program from exiting.
            async_options=ocp.AsyncOptions(
                timeout_secs=timeout_s, create_directories_asynchronously=False
            ),
        )
        return ocp.CheckpointManager(folder, options=options)
    except OSError as error:
        raise CheckpointError(
            f"Cannot write checkpoints to {folder} ({error}). Use a writable folder, or open this "
            "one with read_only=True."
        ) from error


def close_failed(manager: ocp.CheckpointManager, timeout_s: float = 60.0) -> None:
    """Closes a manager whose save failed, and waits for the threads that still write.

    Orbax stops waiting at the first item that fails, while the threads of the other items go on.
    They would collide with the deletion of the unfinished save or with a new save of the same step.
    """
    with contextlib.suppress(Exception):  # the failure was raised before
        manager.close()
    # Orbax has no public way to wait for all of these threads. The futures of its handlers, the
    # closest, are chains that also stop at the first failure. Other threads that began during the
    # save cannot be joined either: the workers of its pools live on. So the threads are found by
    # the package that defines their class, which a test checks. If that changes, only this wait is
    # lost: the digests still detect a checkpoint with parts of another save.
    end = time.monotonic() + timeout_s
    for thread in threading.enumerate():
        if (
            type(thread).__module__.startswith("orbax.")
            and thread is not threading.current_thread()
        ):
            with contextlib.suppress(Exception):
                thread.join(max(end - time.monotonic(), 0.0))
