"""A folder of checkpoints: saving, keeping the newest and the best, restoring."""

import contextlib
import functools
import operator
import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import jax
import numpy as np

from loft_jax.checkpoint import _folder, _processes, _reading
from loft_jax.checkpoint._base import BaseReference
from loft_jax.checkpoint._errors import CheckpointError, DamagedCheckpointWarning, brief
from loft_jax.checkpoint._leaves import (
    begin_records,
    by_path,
    check_equal_everywhere,
    named_leaves,
    options_by_path,
)
from loft_jax.checkpoint._ownership import Ownership
from loft_jax.checkpoint._reading import Restored
from loft_jax.checkpoint._record import Damaged, Record, decode_data, encode_data, parse
from loft_jax.checkpoint._restoring import restore_newest
from loft_jax.checkpoint._retention import Retention, warn_of_undeleted
from loft_jax.checkpoint._saving import Save
from loft_jax.checkpoint._scales import known_scales


class Checkpoints:
    """The checkpoints of one run, in one folder.

    A checkpoint contains the adapter, the optimizer state, the step, the position in the data, the
    random key and metrics. It identifies the frozen base by name and checksums. Only one run writes
    to a folder, and holds a lock on it until it is closed; others can read it with
    ``read_only=True``. Threads may share an object: its methods run one after the other. In a
    multi-process run, the folder must be on a shared file system, and all processes must call each
    method together with the same arguments.

    Args:
      folder: a local or mounted folder, created if it does not exist.
      base: reference to the frozen base, from `base_reference`. Checkpoints of another base are
        refused; None skips the comparison.
      pairs: names and scales of the factors, as in the optimizers: a `LoraPairs`, or the
        `LoraRule` with which the model was adapted. Checkpoints of adapters with other scales are
        refused. None compares those that `add_lora`, `LoraModel` or qwix made in this process.
      keep: number of newest checkpoints to keep. With 2, the run survives one damaged checkpoint.
      keep_every: checkpoints of steps that are multiples of this are kept in addition.
      best: name of a metric. The checkpoint with its best value is kept in addition.
      best_mode: "min" or "max".
      save_every: `save` skips steps that are not a multiple of this, unless forced.
      asynchronous: write in the background. The next steps may donate the saved arrays.
      read_only: never change the folder.
      timeout_s: how long a background save may wait for the other processes, in seconds.
      take_over: take the lock of the folder from another run without asking whether it is alive.

    Raises:
      CheckpointError: the folder cannot be created or is not writable, or another run writes to it.
      ValueError: an argument is out of range.

    Example:
      >>> import tempfile, jax.numpy as jnp, optax
      >>> adapter = {"lora_a": jnp.ones((3, 1)), "lora_b": jnp.zeros((1, 2))}
      >>> state, folder = optax.adam(0.1).init(adapter), tempfile.mkdtemp()
      >>> with Checkpoints(folder, best="loss") as checkpoints:
      ...     checkpoints.save(7, adapter=adapter, opt_state=state, metrics={"loss": 2.0})
      True
      >>> with Checkpoints(folder) as checkpoints:
      ...     restored = checkpoints.restore(adapter=adapter, opt_state=state)
      >>> restored.step, restored.metrics
      (7, {'loss': 2.0})
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        base: BaseReference | None = None,
        pairs: Any = None,
        keep: int = 2,
        keep_every: int | None = None,
        best: str | None = None,
        best_mode: Literal["min", "max"] = "min",
        save_every: int = 1,
        asynchronous: bool = True,
        read_only: bool = False,
        timeout_s: int = 600,
        take_over: bool = False,
    ):
        counts = {"keep": keep, "keep_every": keep_every, "save_every": save_every}
        for name, value in (counts | {"timeout_s": timeout_s}).items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if best_mode not in ("min", "max"):
            raise ValueError(f"best_mode must be 'min' or 'max', got {best_mode!r}.")
        self.folder = _checked_path(folder)
        self._base, self._best = base, best
        self._pairs = pairs
        self._scales: dict[tuple[str, ...], dict[str, float]] = {}
        self._retention = Retention(self.folder, keep, keep_every, best, best_mode)
        self._save_every, self._asynchronous = save_every, asynchronous
        self._read_only, self._timeout_s = read_only, timeout_s
        self._ownership = Ownership(self.folder, take_over)
        self._saving: Save | None = None
        self._lock, self._process = threading.RLock(), os.getpid()
        if not read_only:
            try:
                warn_of_undeleted(self.folder, self._ownership.claim(), stacklevel=2)
            except BaseException:
                self.close()
                raise

    def save(
        self,
        step: SupportsIndex,
        *,
        adapter: Any,
        opt_state: Any,
        key: Any = None,
        data: Any = None,
        metrics: Mapping[str, jax.typing.ArrayLike] | None = None,
        force: bool = False,
    ) -> bool:
        """Saves the state after ``step`` updates.

        Returns as soon as the arrays may be donated. A background save is complete after `wait` or
        the next `save`. Checkpoints are never overwritten.

        Args:
          step: number of updates made.
          adapter, opt_state: pytrees of arrays and numbers, of any dtype and on any mesh.
          key: a pytree of random keys, typed or raw.
          data: position in the data: bytes or a JSON-serializable value, of process 0.
          metrics: numbers or scalar arrays by name. NaN never counts as best.
          force: save also at a step that ``save_every`` would skip.

        Returns:
          Whether a checkpoint was saved. False if ``save_every`` skips the step, or if the same
          state was saved already.

        Raises:
          CheckpointError: this save or the previous background save failed (earlier checkpoints
            remain intact, later saves may succeed); or the step was saved with other values; or the
            step is older than the newest checkpoint.
          ValueError: two leaves have the same path; process-local values differ between processes;
            or ``metrics`` lacks the metric named by ``best``.
          TypeError: a leaf is not an array or a number, or ``data`` is not JSON-serializable.

        Example:
          >>> import tempfile, jax.numpy as jnp
          >>> with Checkpoints(tempfile.mkdtemp(), save_every=10) as checkpoints:
          ...     for step in range(1, 31):
          ...         adapter = {"lora_a": jnp.full((3, 1), step), "lora_b": jnp.zeros((1, 2))}
          ...         _ = checkpoints.save(step, adapter=adapter, opt_state=())
          ...     checkpoints.steps()
          (20, 30)
        """
        if self._read_only:
            raise CheckpointError(
                f"{self.folder} was opened with read_only=True and cannot be saved to."
            )
        if self._is_forked():
            raise CheckpointError(
                f"{self.folder} was opened in process {self._process}, of which this process is a "
                "fork. Save there. Processes that save must be spawned, with a folder each."
            )
        step = operator.index(step)  # also of NumPy, which JSON cannot encode
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}.")
        if step % self._save_every and not force:
            return False
        measured = {name: float(np.asarray(value)) for name, value in (metrics or {}).items()}
        if measured and self._best is not None and self._best not in measured:
            raise ValueError(
                f"metrics {list(measured)} lack {self._best!r}, the metric named by best."
            )
        data = decode_data(encode_data(data))  # a copy: it is written in the background
        trees = {"adapter": adapter, "opt_state": opt_state, "key": key}
        named = {item: named_leaves(tree, item) for item, tree in trees.items()}
        with self._lock:
            # Listed from disk: another run may have saved there, and Orbax would overwrite it.
            steps = self.steps()
            warn_of_undeleted(self.folder, self._ownership.claim(), stacklevel=2)
            measured = _processes.on_first_process(lambda: measured)
            begun = {item: begin_records(*leaves) for item, leaves in named.items()}
            is_local = lambda x: not isinstance(x, jax.Array)
            local = {
                item: [path for path, x in leaves.items() if is_local(x)]
                for item, (leaves, _) in named.items()
            }
            options = {item: options_by_path(tree) for item, tree in trees.items()}
            scales = self._scales_of(adapter, tuple(named["adapter"][0]))

            @functools.cache
            def describe() -> Record:  # without the arrays, whose memory may be needed
                items = {item: finish() for item, finish in begun.items()}
                check_equal_everywhere(local, items)
                return Record(step, items, options, data, measured, self._base, scales=scales)

            if not self._is_new(step, describe, steps):
                return False
            # Orbax accepts neither empty arrays nor empty trees. The record describes them in full.
            arrays = {
                item: {path: x for path, x in leaves.items() if x.size}
                for item, (leaves, _) in named.items()
            }
            arrays = {item: leaves for item, leaves in arrays.items() if leaves}
            self._saving = Save(
                self.folder, step, describe, arrays, self._timeout_s, self._ownership.check
            )
            self._retention.add(step, measured)
            if not self._asynchronous:
                self.wait()
            return True

    def restore(
        self, *, adapter: Any, opt_state: Any = None, key: Any = None, step: int | None = None
    ) -> Restored | None:
        """Restores the newest intact checkpoint.

        A damaged checkpoint (a file missing, truncated or corrupted) is moved to the folder
        ``damaged`` with a `DamagedCheckpointWarning`, and the next older one is tried. An intact
        checkpoint of another setup is an error and never skipped.

        Args:
          adapter, opt_state, key: targets: trees like the saved ones, of arrays or
            `jax.ShapeDtypeStruct`. Each array is restored in the target's dtype and sharding (the
            default device if it has none), whatever it was saved in. None skips the item.
          step: restore this step only; None restores the newest.

        Returns:
          What was saved; None if the folder has no checkpoint.

        Raises:
          CheckpointMismatch: the checkpoint is of another setup. The message lists the paths or the
            options that differ.
          CheckpointDamaged: no checkpoint is intact, or ``step`` is not.
          CheckpointError: ``step`` does not exist; or a checkpoint cannot be read now (permissions,
            disk) or placed in the target's shardings. It is not moved.
          ValueError: two leaves have the same path.

        Example:
          >>> import tempfile, jax, jax.numpy as jnp
          >>> adapter = {"lora_a": jnp.ones((3, 1)), "lora_b": jnp.zeros((1, 2))}
          >>> with Checkpoints(tempfile.mkdtemp()) as checkpoints:
          ...     _ = checkpoints.save(7, adapter=adapter, opt_state=())
          ...     restored = checkpoints.restore(adapter=jax.eval_shape(lambda: adapter))
          >>> restored.step, restored.adapter["lora_b"]
          (7, Array([[0., 0.]], dtype=float32))
        """
        targets = {"adapter": adapter, "opt_state": opt_state, "key": key}
        targets = {item: tree for item, tree in targets.items() if tree is not None}
        scales = self._scales_of(adapter, tuple(by_path(adapter, "adapter")))
        with self._lock:
            return restore_newest(
                self.folder,
                step,
                self.steps,
                lambda found: _reading.read(self.folder, found, targets, self._base, scales),
                self._set_aside,
                self._read_only,
            )

    def steps(self) -> tuple[int, ...]:
        """Returns the saved steps in order, after waiting for a background save.

        Raises:
          CheckpointError: the folder cannot be read, or the background save failed.
        """
        self.wait()
        try:
            return tuple(_processes.on_first_process(lambda: _folder.steps(self.folder)))
        except OSError as error:
            raise CheckpointError(
                f"{self.folder} cannot be read ({error}). Check its permissions and the disk."
            ) from error

    def latest_step(self) -> int | None:
        """Returns the newest saved step; None if there is none. Raises as `steps`."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """Returns the step with the best metric, the first of equals; None if none has it.

        Raises as `steps`.
        """
        return self._retention.best_of(self.steps())

    def wait(self) -> None:
        """Waits until the background save is complete, then deletes checkpoints not to be kept.

        Warns of those that could not be deleted (`UndeletedCheckpointWarning`). Does nothing in a
        forked process.

        Raises:
          CheckpointError: the save failed, in this or another process.
        """
        if self._is_forked():
            return
        with self._lock:
            if self._saving is None:
                return
            step, error = self._saving.step, self._saving.result()
            self._saving = None
            failed = _processes.worst(int(error is not None))
            if failed:
                self._retention.remove(step)
                reason = "it failed in another process" if error is None else brief(error)
                raise CheckpointError(
                    f"step {step} could not be saved to {self.folder}: {reason}\nEarlier "
                    "checkpoints are intact. Check that the disk has space, that the folder exists "
                    "and is writable, and that all processes are alive. Then save again."
                ) from error
            warn_of_undeleted(self.folder, self._retention.delete_obsolete(), stacklevel=2)

    def close(self) -> None:
        """Waits for the background save and releases all resources. Raises as `wait`."""
        try:
            self.wait()
        finally:
            self._ownership.release()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any):
        try:
            self.close()
        except CheckpointError as of_close:
            if error is None:
                raise
            error.add_note(str(of_close))

    def _is_forked(self) -> bool:
        """Whether this process is a fork of the one that opened the folder; it has no threads."""
        return os.getpid() != self._process

    def _scales_of(self, adapter: Any, paths: tuple[str, ...]) -> Mapping[str, float]:
        """Returns the known scales of an adapter, searched for once for each set of paths."""
        if paths not in self._scales:
            self._scales[paths] = known_scales(adapter, paths, self._pairs)
        return self._scales[paths]

    def _is_new(self, step: int, describe: Callable[[], Record], steps: Sequence[int]) -> bool:
        newest = max(steps, default=-1)
        if step > newest:
            return True
        if step not in steps:
            raise CheckpointError(
                f"{self.folder}: step {step} is older than the newest checkpoint, {newest}, "
                "and would not be kept. To continue from an older step, save to another folder."
            )
        record = describe()
        text = _processes.on_first_process(lambda: _folder.record_text(self.folder, step))
        with contextlib.suppress(Damaged, ValueError):
            there = parse(text or "", step)
            same = (there.items, there.options) == (record.items, record.options)
            if same and _processes.on_first_process(lambda: there.data == record.data):
                return False
        raise CheckpointError(
            f"{self.folder}: step {step} was saved already, with other values. Checkpoints "
            "are never overwritten: restore before continuing, or save to another folder."
        )

    def _set_aside(self, step: int, reason: str) -> None:
        message = f"{self.folder / str(step)} is damaged and was skipped: {reason}"
        if not self._read_only:
            try:
                to = _processes.on_first_process(lambda: _folder.move_to_damaged(self.folder, step))
            except OSError as error:
                raise CheckpointError(
                    f"{message}\nIt could not be moved away ({error}). Move it manually."
                ) from error
            message = f"{message}\nIt was moved to {to}."
            self._retention.remove(step)
        warnings.warn(message, DamagedCheckpointWarning, stacklevel=4)


def _checked_path(folder: str | os.PathLike[str]) -> Path:
    """Returns the absolute path of a folder."""
    try:
        path = Path(folder).absolute()
        str(path).encode()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} cannot be found: the working directory was deleted. Use an absolute path."
        ) from error
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"{str(folder)!a} is not UTF-8, the encoding that Orbax needs. Use another folder."
        ) from error
    return path
