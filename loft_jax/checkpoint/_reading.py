"""Reading one checkpoint, and checking that it is intact and fits the targets."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from loft_jax.checkpoint import _folder, _processes, _storage
from loft_jax.checkpoint._base import BaseReference, base_differences
from loft_jax.checkpoint._digest import digests
from loft_jax.checkpoint._errors import CheckpointError, CheckpointMismatch, brief, listing
from loft_jax.checkpoint._leaves import (
    LeafRecord,
    by_path,
    differences,
    nesting_hint,
    options_by_path,
    options_differences,
    put_back,
    rank_hint,
    read_sharding,
)
from loft_jax.checkpoint._record import Damaged, Record, parse
from loft_jax.checkpoint._scales import scale_differences

_ITEMS = ("adapter", "opt_state", "key")

_BATCH_BYTES = 2**28

_GOOD, _DAMAGED, _UNREADABLE = range(3)


class Restored(NamedTuple):
    """The result of `Checkpoints.restore`.

    Attributes:
      step: number of updates made.
      adapter, opt_state, key: in the structure, dtypes and shardings of the targets; None without a
        target.
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
    """The checkpoint was deleted while it was read."""


def read(
    folder: Path,
    step: int,
    targets: Mapping[str, Any],
    base: BaseReference | None,
    scales: Mapping[str, float],
) -> Restored:
    """Reads the checkpoint of a step.

    Args:
      folder: the folder of the run.
      step: the step to read.
      targets: the target tree of each item.
      base: the run's base; None skips the comparison.
      scales: of the adapter's pairs in this run, by path, as far as known.

    Raises:
      Damaged: the checkpoint is damaged.
      Vanished: the checkpoint was deleted.
      CheckpointMismatch: the checkpoint is intact but does not fit.
      CheckpointError: the checkpoint cannot be read now.
    """
    record = _read_record(folder, step)
    leaves = {item: by_path(tree, item) for item, tree in targets.items()}
    where = f"{folder / str(step)} (saved by loft_jax {record.version})"
    _check_trees(where, record, leaves, targets)
    _check_placement(where, record, leaves)
    if base is not None and (lines := base_differences(record.base, base)):
        raise CheckpointMismatch(
            listing(
                f"{where} belongs to another base. Load the weights it was trained on, or use "
                "another folder for the new run.",
                lines,
            )
        )
    if lines := scale_differences(record.scales, scales):
        raise CheckpointMismatch(
            listing(
                f"{where} is of adapters with another scale alpha / rank, so that this model would "
                "compute something else. Make the adapters with the LoraRule that they were "
                "trained with, or use another folder for the new run. (Checkpoints(pairs=...) "
                "states the scales where this process knows others.)",
                lines,
            )
        )
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
            # A part of ours may be left: deleted halfway, by hand or by an older version.
            if not {*names} <= {"meta", *_ITEMS, *_storage.OWN_FILES}:
                raise CheckpointMismatch(
                    f"{folder / str(step)} was not written by loft_jax.checkpoint: it contains "
                    f"{', '.join(names)}. Use another folder."
                )
            raise Damaged("its record (meta) is missing")
    except OSError as error:
        raise _unreadable(folder / str(step), error) from error
    try:
        return parse(text, step)
    except ValueError as error:
        raise CheckpointMismatch(f"{folder / str(step)}: {error}") from error


def _check_trees(
    where: str,
    record: Record,
    leaves: Mapping[str, Mapping[str, Any]],
    targets: Mapping[str, Any],
) -> None:
    """Raises `CheckpointMismatch` if paths, shapes, kinds of dtypes or options differ."""
    found: dict[str, list[str]] = {}
    for item, wanted in leaves.items():
        saved = record.items.get(item, {})
        if not saved and wanted:
            found[item] = [f"{item}: wanted, but not saved"]
            continue
        options = None if record.options is None else record.options.get(item, {})
        found[item] = options_differences(options, options_by_path(targets[item]), item)
        found[item] += differences(saved, wanted, item)
    lines = [line for of_item in found.values() for line in of_item]
    if not lines:
        return
    hint = None
    if found.get("adapter"):
        hint = rank_hint(record.items.get("adapter", {}), leaves["adapter"])
    elif _has_old_layout(record.items.get("opt_state", {}), leaves.get("opt_state", {})):
        raise CheckpointMismatch(
            listing(
                f"{where} has the layout of optimizer states before this version (`turn` where "
                "`active` is wanted). That state cannot be continued. To keep the weights, restore "
                "the adapter alone with `restore(adapter=...)`, create a new state with the "
                "optimizer's `init`, and save to another folder.",
                lines,
            )
        )
    elif found.get("opt_state"):
        hint = nesting_hint(record.items.get("opt_state", {}), leaves["opt_state"])
    raise CheckpointMismatch(
        listing(
            f"{where} is intact, but of another setup{f': {hint}' if hint else ''}. Restore it "
            "with the adapter and the optimizer that saved it, or use another folder for the new "
            "run.",
            lines,
        )
    )


def _has_old_layout(saved: Mapping[str, LeafRecord], wanted: Mapping[str, Any]) -> bool:
    """Whether a LoFT state was saved with ``turn`` in place of ``active``.

    ``turn`` was 0 for the factor named by ``moves_first`` and ``active`` is 0 for ``b``, so the one
    cannot be read as the other.
    """
    fields = lambda paths: {path.rpartition("/")[2] for path in paths}
    return "turn" in fields(set(saved) - set(wanted)) and "active" in fields(
        set(wanted) - set(saved)
    )


def _check_placement(where: str, record: Record, leaves: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises `CheckpointMismatch` if a target's sharding does not divide the stored shape."""
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
                f"{where} is intact, but cannot be sharded like the targets. Use shardings that "
                "divide the shapes, such as those of loft_jax.sharding.state_shardings.",
                lines,
            )
        )


def _read_arrays(
    folder: Path, saved: Mapping[str, LeafRecord], wanted: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the arrays of an item in the dtypes they were saved in, verified by their digests."""
    if not saved:
        return {}
    code, reason, arrays = _GOOD, "", {}
    try:
        arrays = _read(folder, saved, wanted)
    except Exception as error:
        code, reason = _classify(folder, error)
        if code == _DAMAGED and _whole_on_the_host(folder, saved):
            code = _UNREADABLE  # the files are intact
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


def verify(
    folder: Path, record: Record, arrays: Mapping[str, Mapping[str, np.ndarray]] | None
) -> None:
    """Reads a checkpoint that was just written, and compares it with what it should be.

    Args:
      folder: of the checkpoint.
      record: of the checkpoint, with the digests of all arrays.
      arrays: the arrays themselves, if they are at hand: they compare faster than digests.

    Raises:
      ValueError: an array cannot be read or has other values.
    """
    for item, leaves in record.items.items():
        stored = {path: leaf for path, leaf in leaves.items() if 0 not in leaf.shape}
        written = None if arrays is None else arrays.get(item, {})
        for batch in _batches(stored):
            try:
                wrong = _wrong(_storage.read_back(folder / item, batch), batch, written)
            except Exception as error:
                wrong = [brief(error)]
            # Orbax decides: a later version may store arrays otherwise. It reads one at least, for
            # which it needs its own files.
            smallest = min(batch, key=lambda path: _size(batch[path]))
            asked = batch if wrong else {smallest: batch[smallest]}
            found = _read(folder / item, asked, dict.fromkeys(asked), len(asked) < len(stored))
            if wrong := _wrong(found, asked, written):
                raise ValueError(f"{item}: {wrong[0]} has other values when it is read back")


def _wrong(
    found: Mapping[str, np.ndarray],
    saved: Mapping[str, LeafRecord],
    written: Mapping[str, np.ndarray] | None,
) -> list[str]:
    """Returns the paths of arrays that are not what was written, or not what was recorded."""
    digest = digests(dict(found)) if written is None else {}

    def same(path: str, leaf: LeafRecord) -> bool:
        x = found[path]
        if x.shape != leaf.shape or x.dtype != jnp.dtype(leaf.dtype):
            return False
        return digest[path] == leaf.digest if written is None else _same_bits(x, written[path])

    return [path for path, leaf in saved.items() if not same(path, leaf)]


def _batches(leaves: Mapping[str, LeafRecord]) -> Iterator[dict[str, LeafRecord]]:
    """Splits leaves into groups that need a limited memory."""
    batch, size = {}, 0
    for path, leaf in leaves.items():
        batch[path] = leaf
        size += _size(leaf)
        if size > _BATCH_BYTES:
            yield batch
            batch, size = {}, 0
    if batch:
        yield batch


def _size(leaf: LeafRecord) -> int:
    return math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize


def _same_bits(x: np.ndarray, y: np.ndarray) -> bool:
    as_bytes = lambda array: np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return np.array_equal(as_bytes(x), as_bytes(y))


def _whole_on_the_host(folder: Path, saved: Mapping[str, LeafRecord]) -> bool:
    """Whether the arrays are intact when read to the host, without devices and shardings."""
    try:
        found = digests(_read(folder, saved, dict.fromkeys(saved)))
    except Exception:
        return False
    return all(found[path] == leaf.digest for path, leaf in saved.items())


def _read(
    folder: Path,
    saved: Mapping[str, LeafRecord],
    wanted: Mapping[str, Any],
    partial: bool = False,
) -> dict[str, Any]:
    """Reads arrays of an item in the shardings of the targets, unverified.

    Raises:
      Exception: of Orbax, if an array cannot be read.
      ValueError: an array has another shape or dtype than its record.
    """
    shardings = {path: read_sharding(wanted[path]) for path in saved}
    stored = {path: leaf for path, leaf in saved.items() if 0 not in leaf.shape}
    arrays = _storage.read(folder, stored, shardings, partial) if stored else {}
    for path, leaf in saved.items():
        if path not in stored:  # empty: in the record only
            empty, sharding = np.zeros(leaf.shape, jnp.dtype(leaf.dtype)), shardings[path]
            arrays[path] = empty if sharding is None else jax.device_put(empty, sharding)
        elif tuple(arrays[path].shape) != leaf.shape or arrays[path].dtype != jnp.dtype(leaf.dtype):
            raise ValueError(
                f"{path} is {arrays[path].dtype}{tuple(arrays[path].shape)} but was recorded as "
                f"{leaf.dtype}{leaf.shape}"
            )
    return arrays


def _classify(folder: Path, error: Exception) -> tuple[int, str]:
    """Distinguishes permanent damage from failures that may pass. Returns a code and a reason."""
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
        pass  # deleted meanwhile
    except OSError as problem:
        return _UNREADABLE, str(problem)
    return _DAMAGED, reason


def _agree(folder: Path, code: int, reason: str) -> None:
    """Raises the error of the worst code in all processes."""
    worst = _processes.worst(code)
    if code != worst:
        reason = "found by another process"
    if worst == _UNREADABLE:
        raise _unreadable(folder.parent, reason)
    if worst == _DAMAGED:
        gone = _processes.on_first_process(lambda: not folder.parent.exists())
        raise Vanished if gone else Damaged(reason)


def _unreadable(where: Path, why: object) -> CheckpointError:
    return CheckpointError(
        f"{where} cannot be read ({why}). It may be intact and was not moved. Check "
        "permissions, disk and memory, and run again."
    )
