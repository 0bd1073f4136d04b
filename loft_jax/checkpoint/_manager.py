"""Orbax's manager as the checkpoints of a run need it."""

import contextlib
import threading
import time
from pathlib import Path

import orbax.checkpoint as ocp

from loft_jax.checkpoint import _folder, _processes
from loft_jax.checkpoint._errors import CheckpointError
from loft_jax.checkpoint._retention import Kept


def open_manager(
    folder: Path,
    kept: Kept,
    asynchronous: bool,
    timeout_s: int,
) -> ocp.CheckpointManager:
    """Makes the folder if need be, and clears away what killed saves left there.

    Raises:
      CheckpointError: the folder cannot be made or written to.
    """
    try:
        _processes.on_first_process(lambda: _folder.make(folder))
        _processes.on_first_process(lambda: _folder.clear_half_written(folder))
        options = ocp.CheckpointManagerOptions(
            create=False,
            # Orbax would clear them in the background, after this returns, and with them what a
            # run that took this one's place had begun to save.
            cleanup_tmp_directories=False,
            # Metrics are in our own record; Orbax need not read any, which might be damaged.
            lightweight_initialize=True,
            preservation_policy=kept,
            enable_async_checkpointing=asynchronous,
            # Made in the background, folders that cannot be made leave threads that wait for them,
            # and keep the program from ending, for minutes.
            async_options=ocp.AsyncOptions(
                timeout_secs=timeout_s, create_directories_asynchronously=False
            ),
        )
        return ocp.CheckpointManager(folder, options=options)
    except OSError as error:
        raise CheckpointError(
            f"checkpoints cannot be written to {folder} ({error}): name a folder that can be, or "
            "open it with read_only=True"
        ) from error


def end_failed(manager: ocp.CheckpointManager, timeout_s: float = 60.0) -> None:
    """Ends a manager whose save failed, and waits for what still writes to its folder.

    Orbax gives up at the first part that fails. The threads of the others go on, and would run
    into those that clear the folder, or into the next save of the same step.
    """
    with contextlib.suppress(Exception):  # the failure was raised before
        manager.close()
    end = time.monotonic() + timeout_s
    for thread in threading.enumerate():
        if (
            type(thread).__module__.startswith("orbax.")
            and thread is not threading.current_thread()
        ):
            with contextlib.suppress(Exception):
                thread.join(max(end - time.monotonic(), 0.0))
