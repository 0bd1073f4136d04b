"""A folder of checkpoints: saves, keeps the last and the best, restores the newest good one."""

import contextlib
import operator
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import jax
import numpy as np
import orbax.checkpoint as ocp

from loft_jax.checkpoint import _folder, _processes, _reading
from loft_jax.checkpoint._base import BaseReference
from loft_jax.checkpoint._errors import (
    CheckpointDamaged,
    CheckpointError,
    DamagedCheckpointWarning,
    brief,
    listing,
)
from loft_jax.checkpoint._leaves import check_equal_everywhere, named_leaves, records
from loft_jax.checkpoint._manager import end_failed, open_manager
from loft_jax.checkpoint._reading import Restored
from loft_jax.checkpoint._record import NotWhole, Record, encode_data, parse
from loft_jax.checkpoint._retention import Kept

# How often to look again for a checkpoint when those that were there are deleted meanwhile.
_ATTEMPTS = 5


class Checkpoints:
    """The checkpoints of one run, in one folder.

    It keeps what a fine-tuning run needs and no more: the adapter, the optimizer's state, the step,
    the position in the data and the random key; the frozen base by its name and checksums. One run
    writes to a folder; others may read it (``read_only=True``). In a run of several processes the
    folder is on a file system that all share, and all processes call each method together, with
    the same arguments.

    Args:
      folder: a local or mounted folder; made if need be.
      base: the frozen base, from `base_reference`; a checkpoint of another base is then refused.
      keep: how many of the newest checkpoints to keep. With 2, the run survives one damaged.
      best: name of a metric; the checkpoint with the best is kept besides.
      best_mode: "min" or "max", what is best.
      save_every: `save` passes over steps that are no multiple, unless forced.
      asynchronous: write in the background, while the next steps train and donate the arrays.
      read_only: change nothing in the folder.
      timeout_s: how long a save in the background may wait for the other processes.

    Raises:
      CheckpointError: the folder cannot be made or written to.
      ValueError: an argument out of range.

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
        keep: int = 2,
        best: str | None = None,
        best_mode: Literal["min", "max"] = "min",
        save_every: int = 1,
        asynchronous: bool = True,
        read_only: bool = False,
        timeout_s: int = 600,
    ):
        if keep < 1 or save_every < 1 or timeout_s < 1:
            raise ValueError(
                f"keep, save_every and timeout_s must be at least 1, got {keep}, {save_every} and "
                f"{timeout_s}"
            )
        if best_mode not in ("min", "max"):
            raise ValueError(f"best_mode must be 'min' or 'max', got {best_mode!r}")
        self.folder = Path(folder).absolute()
        self._base, self._best = base, best
        self._kept = Kept(self.folder, keep, best, best_mode)
        self._save_every, self._asynchronous = save_every, asynchronous
        self._read_only, self._timeout_s = read_only, timeout_s
        self._manager: ocp.CheckpointManager | None = None
        self._failed: ocp.CheckpointManager | None = None
        self._saving: int | None = None
        if not read_only:
            self._open()

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

        Returns when the arrays may be donated; what is written in the background is whole after
        `wait` or the next `save`. A checkpoint is never overwritten.

        Args:
          step: number of updates made.
          adapter, opt_state: pytrees of arrays and numbers, of any dtype and on any mesh.
          key: random keys, typed or not: a pytree.
          data: position in the data: bytes, or what JSON can hold. Process 0's is saved.
          metrics: numbers or scalar arrays by name. NaN is never best.
          force: also at a step that ``save_every`` passes over.

        Returns:
          Whether it was saved: False at a step between, or if the same is saved already.

        Raises:
          CheckpointError: this save, or the one in the background before it, could not be written
            (earlier checkpoints are whole; later saves may succeed); the step is saved with other
            values, or lies before the newest.
          ValueError: two leaves with one path; values that differ between processes where all
            should hold the same; ``metrics`` without the metric named by ``best``.
          TypeError: a leaf that is no array or number; ``data`` that JSON cannot hold.
        """
        if self._read_only:
            raise CheckpointError(f"{self.folder} was opened with read_only=True: nothing is saved")
        step = operator.index(step)  # NumPy's too, which JSON does not know
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        if step % self._save_every and not force:
            return False
        measured = {name: float(np.asarray(value)) for name, value in (metrics or {}).items()}
        if measured and self._best is not None and self._best not in measured:
            raise ValueError(f"metrics {list(measured)} lack {self._best!r}, which tells the best")
        encode_data(data)
        trees = {"adapter": adapter, "opt_state": opt_state, "key": key}
        named = {item: named_leaves(tree, item) for item, tree in trees.items()}
        # Those on disk: another run may have saved there, and Orbax would write over it.
        steps = self.steps()
        manager = self._open()
        measured = _processes.on_first_process(lambda: measured)
        described = {item: records(*leaves) for item, leaves in named.items()}
        check_equal_everywhere(named, described)
        record = Record(step, described, data, measured, self._base)
        if not self._is_new(record, steps):
            return False
        # JAX copies what a step donates while Orbax still reads it, so that we need not.
        # Orbax takes neither empty arrays nor empty trees; the record says all there is to say.
        arrays = {
            item: {path: x for path, x in leaves.items() if x.size}
            for item, (leaves, _) in named.items()
        }
        parts = {item: ocp.args.StandardSave(leaves) for item, leaves in arrays.items() if leaves}
        self._kept.add(record)
        self._saving = step
        try:
            manager.save(
                step,
                args=ocp.args.Composite(**parts, meta=ocp.args.JsonSave(record.to_json())),
                force=True,
            )
        except Exception as error:
            raise self._not_saved(error) from error
        return True

    def restore(
        self, *, adapter: Any, opt_state: Any = None, key: Any = None, step: int | None = None
    ) -> Restored | None:
        """Restores the newest good checkpoint.

        One that is damaged (a file missing, cut short, or with a bit flipped) is moved to the
        folder ``damaged``, with a `DamagedCheckpointWarning`, and the next older one is tried. One
        that is whole but of another setup is never passed over.

        Args:
          adapter, opt_state, key: what is wanted: trees like those that were saved, of arrays or
            `jax.ShapeDtypeStruct`. Each array comes back in the target's dtype and sharding (on the
            default device if it has none); they need not be those it was saved in. With None, the
            part is left out.
          step: this one and no other.

        Returns:
          What was saved, or None if the folder has no checkpoint.

        Raises:
          CheckpointMismatch: it is of another setup; the message names the paths that differ.
          CheckpointDamaged: there are or were checkpoints, but none is whole; or not this ``step``.
          CheckpointError: there is no such ``step``; or it cannot be read (no permission, a failing
            disk) or put where the target says, which says nothing of what is in it: it stays where
            it is.
          ValueError: two leaves with one path.
        """
        targets = {"adapter": adapter, "opt_state": opt_state, "key": key}
        targets = {item: tree for item, tree in targets.items() if tree is not None}
        reasons: dict[int, str] = {}
        for _ in range(_ATTEMPTS):
            steps, vanished = self.steps(), False
            if step is not None and step not in steps:
                found = f"{list(steps) or 'none'}"
                raise CheckpointError(f"{self.folder} has no step {step}, but {found}")
            for candidate in reversed(steps) if step is None else [step]:
                try:
                    return _reading.read(self.folder, candidate, targets, self._base)
                except _reading.Vanished:
                    vanished = True  # its run deleted it meanwhile, having saved a newer one
                except NotWhole as damage:
                    if self._read_only and candidate not in self.steps():
                        vanished = True  # half of it was deleted already
                        continue
                    reasons[candidate] = self._set_aside(candidate, str(damage))
            if not vanished:
                break
        else:
            raise CheckpointError(
                f"{self.folder}: its run deletes checkpoints faster than they are read; try again, "
                "or let it keep more"
            )
        aside = _processes.on_first_process(lambda: _folder.set_aside(self.folder))
        if not reasons and not aside:
            return None
        lines = [f"step {step}: {reason}" for step, reason in reasons.items()]
        headline = (
            "no checkpoint is whole. Look for copies of the folder, or start again in another one."
            if step is None
            else f"step {step} is not whole. Leave it out to restore the newest that is."
        )
        raise CheckpointDamaged(
            listing(
                f"{self.folder}: {headline}",
                lines or [f"damaged/{name}: moved there before" for name in aside],
            )
        )

    def steps(self) -> tuple[int, ...]:
        """The steps that are saved, in order; waits for a save in the background.

        Raises:
          CheckpointError: the folder cannot be read, or that save could not be written.
        """
        self.wait()
        try:
            return tuple(_processes.on_first_process(lambda: _folder.steps(self.folder)))
        except OSError as error:
            raise CheckpointError(
                f"{self.folder} cannot be read ({error}): see to its permissions and the disk"
            ) from error

    def latest_step(self) -> int | None:
        """The newest step that is saved, if any; raises as `steps` does."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The saved step with the best metric (the first, of equals); raises as `steps` does."""
        return self._kept.best_of(self.steps())

    def wait(self) -> None:
        """Waits until what is being saved is whole.

        Raises:
          CheckpointError: it could not be written.
        """
        if self._manager is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._not_saved(error) from error

    def close(self) -> None:
        """Waits until what is being saved is whole, and ends; as `wait`, it may raise."""
        try:
            self.wait()
        finally:
            if self._manager is not None:
                self._manager.close()
            if self._failed is not None:
                end_failed(self._failed)
            self._manager = self._failed = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any):
        try:
            self.close()
        except CheckpointError as of_close:
            if error is None:
                raise
            error.add_note(str(of_close))

    def _open(self) -> ocp.CheckpointManager:
        """Orbax's manager, made anew after a failure: that also clears what it left half done."""
        if self._manager is not None:
            return self._manager
        if self._failed is not None:
            end_failed(self._failed)
            self._failed = None
        self._manager = open_manager(self.folder, self._kept, self._asynchronous, self._timeout_s)
        return self._manager

    def _is_new(self, record: Record, steps: Sequence[int]) -> bool:
        newest = max(steps, default=-1)
        if record.step > newest:
            return True
        if record.step not in steps:
            raise CheckpointError(
                f"{self.folder}: step {record.step} comes before the newest checkpoint, {newest}, "
                "and would not be kept. To go on from an older step, save to another folder."
            )
        text = _processes.on_first_process(lambda: _folder.record_text(self.folder, record.step))
        with contextlib.suppress(NotWhole, ValueError):
            there = parse(text or "", record.step)
            if there.items == record.items and _processes.on_first_process(
                lambda: there.data == record.data
            ):
                return False
        raise CheckpointError(
            f"{self.folder}: step {record.step} is saved already, with other values. A checkpoint "
            "is never overwritten: restore before training on, or save to another folder."
        )

    def _not_saved(self, error: Exception) -> CheckpointError:
        # What Orbax has in memory now differs from what is on disk: `_open` begins anew.
        self._failed, self._manager = self._manager, None
        self._kept.remove(self._saving)
        return CheckpointError(
            f"step {self._saving} could not be saved to {self.folder}: {brief(error)}\n"
            "Earlier checkpoints are whole. See that the disk has room, that the folder is there "
            "and may be written to, and that all processes are alive; then save again."
        )

    def _set_aside(self, step: int, reason: str) -> str:
        message = f"{self.folder / str(step)} is damaged and passed over: {reason}"
        if not self._read_only:
            try:
                to = _processes.on_first_process(lambda: _folder.move_to_damaged(self.folder, step))
            except OSError as error:
                raise CheckpointError(
                    f"{message}\nIt cannot be moved out of the way ({error}): move it by hand."
                ) from error
            message = f"{message}\nIt is kept in {to}."
            self._kept.remove(step)
            if self._manager is not None:
                self._manager.reload()
        warnings.warn(message, DamagedCheckpointWarning, stacklevel=3)
        return reason
