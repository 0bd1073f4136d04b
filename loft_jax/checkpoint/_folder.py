"""Operations on the folder of a run. Process 0 performs them."""

import contextlib
import errno
import itertools
import os
import secrets
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from loft_jax.checkpoint import _storage

# Names of folders that are being written or deleted: a step and a part that is unique. Only a
# complete checkpoint has the name of its step.
_SAVING, _DELETING = ".saving-", ".deleting-"


def steps(folder: Path) -> list[int]:
    """Returns the saved steps, sorted. Unfinished saves have longer names."""
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir() if path.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)


def record_text(folder: Path, step: int) -> str | None:
    """Returns the text of a step's record; None if the file is missing."""
    try:
        # Orbax stores a JSON item at this path. A flipped bit can make the UTF-8 invalid.
        return (folder / str(step) / "meta" / "metadata").read_text("utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None


def names(folder: Path) -> list[str] | None:
    """Returns the names in a folder; None if it does not exist."""
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else None


def set_aside(folder: Path) -> list[str]:
    """Returns the names of the checkpoints in ``damaged``."""
    return names(folder / "damaged") or []


def make(folder: Path) -> None:
    """Creates the folder if it does not exist, and checks that it is writable."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        with contextlib.suppress(PermissionError):  # a folder may be writable and not readable
            _flush(path.parent)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(13, "no permission to write", str(folder))


def unfinished_name(step: int) -> str:
    """Returns a name for a save of this step that no other save has, not even a failed one."""
    return f"{step}{_SAVING}{secrets.token_hex(4)}"


def publish(unfinished: Path, step: int) -> None:
    """Renames a complete save to its step, after flushing it to the disk.

    Raises:
      OSError: a file could not be flushed, or the step exists already.
    """
    for path in [*unfinished.rglob("*"), unfinished]:
        _flush(path)
    os.rename(unfinished, unfinished.parent / str(step))
    _flush(unfinished.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot flush a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def clear_unfinished(folder: Path) -> list[str]:
    """Deletes what killed saves and deletions have left. Returns the failures, one line each."""
    marks = (_SAVING, _DELETING, _storage.UNFINISHED)
    left = [path for path in folder.iterdir() if any(mark in path.name for mark in marks)]
    return [line for path in left if (line := _remove(path))]


def delete(folder: Path, steps: Sequence[int]) -> list[str]:
    """Deletes checkpoints. Returns the failures, one line each.

    Each is renamed first: a reader, or the next run, never meets a part of a checkpoint.
    """
    failures = []
    for step in steps:
        deleting = folder / f"{step}{_DELETING}{secrets.token_hex(4)}"
        try:
            os.rename(folder / str(step), deleting)
        except FileNotFoundError:
            continue
        except OSError as error:
            failures.append(f"{step}: {error}")
            continue
        if line := _remove(deleting):
            failures.append(line)
    return failures


def _remove(path: Path) -> str | None:
    """Deletes a folder, and what can be deleted of it. Returns why it is still there."""
    for wait_s in (0.0, 0.1, 0.5):  # threads of a failed save may still add files
        time.sleep(wait_s)
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return None
    try:
        shutil.rmtree(path)
    except OSError as error:
        return f"{path.name}: {error}"
    return None


def move_to_damaged(folder: Path, step: int) -> str:
    """Moves a step to ``damaged`` under an unused name, and returns its new path."""
    aside = folder / "damaged"
    aside.mkdir(exist_ok=True)
    candidates = itertools.chain([str(step)], (f"{step}-{k}" for k in itertools.count(1)))
    to = next(aside / name for name in candidates if not (aside / name).exists())
    os.rename(folder / str(step), to)
    return str(to)
