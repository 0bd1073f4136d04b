"""Reads one checkpoint and sees that it is whole and the one that is wanted."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath  # of Orbax: what its handlers take for a path

from loft_jax.checkpoint import _folder, _processes
from loft_jax.checkpoint._base import BaseReference, base_differences
from loft_jax.checkpoint._digest import digests
from loft_jax.checkpoint._errors import CheckpointError, CheckpointMismatch, brief, listing
from loft_jax.checkpoint._leaves import (
    LeafRecord,
    by_path,
    differences,
    put_back,
    rank_hint,
    read_sharding,
)
from loft_jax.checkpoint._record import NotWhole, Record, parse

_GOOD, _DAMAGED, _UNREADABLE = range(3)


class Restored(NamedTuple):
    """What `Checkpoints.restore` returns.

    Attributes:
      step: number of updates made.
      adapter, opt_state, key: in the structure, dtypes and shardings of the targets; None where
        no target was given.
      data: position in the data, as saved.
      metrics: as saved.
    """

    step: int
    adapter: Any
    opt_state: Any
    key: Any
    data: Any
    metrics: Mapping[str, float]


class Vanished(Exception):
    """The checkpoint is not there any more."""


def read(
    folder: Path, step: int, targets: Mapping[str, Any], base: BaseReference | None
) -> Restored:
    """Reads the checkpoint of a step.

    Args:
      folder: of all checkpoints.
      step: which.
      targets: the wanted tree of each item.
      base: the run's base, None if it is not to be compared.

    Raises:
      NotWhole: it is damaged.
      Vanished: it was deleted.
      CheckpointMismatch: it is whole, but not what is wanted.
      CheckpointError: it cannot be read.
    """
    record = _read_record(folder, step)
    leaves = {item: by_path(tree, item) for item, tree in targets.items()}
    _check(f"{folder / str(step)}", record, leaves, base)
    arrays = {
        item: _read_arrays(folder / str(step) / item, record.items[item], wanted)
        for item, wanted in leaves.items()
    }
    found = {
        item: jax.tree.unflatten(
            jax.tree.structure(tree),
            [put_back(arrays[item][path], leaf) for path, leaf in leaves[item].items()],
        )
        for item, tree in targets.items()
    }
    adapter, opt_state, key = (found.get(item) for item in ("adapter", "opt_state", "key"))
    return Restored(step, adapter, opt_state, key, record.data, dict(record.metrics))


def _read_record(folder: Path, step: int) -> Record:
    try:
        text = _processes.on_first_process(lambda: _folder.record_text(folder, step))
        if text is None:
            names = _processes.on_first_process(lambda: _folder.names(folder / str(step)))
            if names is None:
                raise Vanished
            if names and not {"meta", "adapter", "opt_state"} & set(names):
                raise CheckpointMismatch(
                    f"{folder / str(step)} was not written by loft_jax.checkpoint: it holds "
                    f"{', '.join(names)}. Name another folder."
                )
            raise NotWhole("its record (meta) is missing")
    except OSError as error:
        raise _unreadable(folder / str(step), error) from error
    try:
        return parse(text, step)
    except ValueError as error:
        raise CheckpointMismatch(f"{folder / str(step)}: {error}") from error


def _check(
    where: str,
    record: Record,
    leaves: Mapping[str, Mapping[str, Any]],
    base: BaseReference | None,
) -> None:
    """Raises `CheckpointMismatch` if the checkpoint is of another setup."""
    lines, hint = [], None
    for item, wanted in leaves.items():
        if record.items.get(item) or not wanted:
            saved = record.items.get(item, {})
            lines += differences(saved, wanted, item)
            if item == "adapter" and lines:
                hint = rank_hint(saved, wanted)
        else:
            lines.append(f"{item}: wanted, but nothing of it was saved")
    if not lines:
        _check_placement(where, record, leaves)
    if lines:
        raise CheckpointMismatch(
            listing(
                f"{where} (of loft_jax {record.version}) is whole, but of another setup"
                f"{f': {hint}' if hint else ''}. Restore it with the adapter and the optimizer "
                "that saved it, or let the new run have another folder.",
                lines,
            )
        )
    if base is not None and (lines := base_differences(record.base, base)):
        raise CheckpointMismatch(
            listing(
                f"{where} belongs to another base. Load the weights that it was trained on, or let "
                "the new run have another folder.",
                lines,
            )
        )


def _check_placement(where: str, record: Record, leaves: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises `CheckpointMismatch` if an array cannot be split as its target is."""
    lines = []
    for item, wanted in leaves.items():
        for path, leaf in wanted.items():
            shape, sharding = record.items[item][path].shape, read_sharding(leaf)
            try:
                if sharding is not None:
                    sharding.shard_shape(shape)
            except ValueError as error:
                lines.append(f"{item}: {path}: {brief(error)}")
    if lines:
        raise CheckpointMismatch(
            listing(
                f"{where} is whole, but cannot be split as the targets are. Give them shardings "
                "that divide their shapes; loft_jax.sharding.state_shardings does.",
                lines,
            )
        )


def _read_arrays(
    folder: Path, saved: Mapping[str, LeafRecord], wanted: Mapping[str, Any]
) -> dict[str, Any]:
    """The stored arrays of an item, in the dtypes they were saved in, checked by their digests."""
    if not saved:
        return {}
    # Orbax's manager would wait for the other processes at the end, and for ever if one of them
    # alone finds a file damaged. The handler waits for nobody; the processes agree here.
    code, reason, arrays = _GOOD, "", {}
    try:
        arrays = _restore(folder, saved, wanted)
    except Exception as error:
        code, reason = _classify(folder, error)
        if code == _DAMAGED and _whole_on_the_host(folder, saved):
            code = _UNREADABLE  # it is not the files that are wrong
    _agree(folder, code, reason)
    found = digests(arrays)
    wrong = [path for path, leaf in saved.items() if found[path] != leaf.digest]
    _agree(
        folder,
        _DAMAGED if wrong else _GOOD,
        f"{folder.name}: the values of {', '.join(wrong[:3])}"
        f"{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''} do not match their checksums",
    )
    return arrays


def _whole_on_the_host(folder: Path, saved: Mapping[str, LeafRecord]) -> bool:
    """Whether the arrays are read well where no device and no sharding takes part."""
    try:
        found = digests(_restore(folder, saved, dict.fromkeys(saved)))
    except Exception:
        return False
    return all(found[path] == leaf.digest for path, leaf in saved.items())


def _restore(
    folder: Path, saved: Mapping[str, LeafRecord], wanted: Mapping[str, Any]
) -> dict[str, Any]:
    item, how, arrays = {}, {}, {}
    for path, leaf in saved.items():
        dtype, sharding = jnp.dtype(leaf.dtype), read_sharding(wanted[path])
        if 0 in leaf.shape:  # only the record has it
            empty = np.zeros(leaf.shape, dtype)
            arrays[path] = empty if sharding is None else jax.device_put(empty, sharding)
            continue
        item[path] = jax.ShapeDtypeStruct(leaf.shape, np.uint8)  # a place; `how` has the dtype
        how[path] = (
            ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)
            if sharding is None
            else ocp.ArrayRestoreArgs(
                restore_type=jax.Array, sharding=sharding, global_shape=leaf.shape, dtype=dtype
            )
        )
    if not item:
        return arrays
    handler = ocp.PyTreeCheckpointHandler()
    try:
        arrays |= handler.restore(
            epath.Path(folder), args=ocp.args.PyTreeRestore(item, restore_args=how)
        )
    finally:
        handler.close()
    for path, leaf in saved.items():
        if tuple(arrays[path].shape) != leaf.shape or arrays[path].dtype != jnp.dtype(leaf.dtype):
            raise ValueError(
                f"{path} is {arrays[path].dtype}{tuple(arrays[path].shape)}, recorded as "
                f"{leaf.dtype}{leaf.shape}"
            )
    return arrays


def _classify(folder: Path, error: Exception) -> tuple[int, str]:
    """Tells damage, which is for ever, from what may be otherwise at the next attempt."""
    reason = f"{folder.name}: {brief(error)}"
    if isinstance(error, (MemoryError, jax.errors.JaxRuntimeError)):
        return _UNREADABLE, reason
    try:
        for path in sorted(folder.parent.rglob("*")):
            if path.is_file():
                with path.open("rb") as file:
                    while file.read(1 << 22):
                        pass
    except FileNotFoundError:
        pass  # deleted while we looked
    except OSError as problem:
        return _UNREADABLE, str(problem)
    return _DAMAGED, reason


def _agree(folder: Path, code: int, reason: str) -> None:
    """Raises, in all processes, what the worst code says."""
    worst = _processes.worst(code)
    if code != worst:
        reason = "another process found it so"
    if worst == _UNREADABLE:
        raise _unreadable(folder.parent, reason)
    if worst == _DAMAGED:
        gone = _processes.on_first_process(lambda: not folder.parent.exists())
        raise Vanished if gone else NotWhole(reason)


def _unreadable(where: Path, why: object) -> CheckpointError:
    return CheckpointError(
        f"{where} cannot be read ({why}). It may be whole, and stays where it is: see to the "
        "permissions, the disk or the memory, and run again."
    )
