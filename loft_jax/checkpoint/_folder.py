"""Operations on the folder of a run. Process 0 performs them."""

import os
import shutil
from pathlib import Path

import orbax.checkpoint as ocp


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
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(13, "no permission to write", str(folder))


def clear_unfinished(folder: Path) -> None:
    """Deletes the temporary folders of killed saves."""
    for path in folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
        if path.is_dir():
            shutil.rmtree(path)


def move_to_damaged(folder: Path, step: int) -> str:
    """Moves a step to ``damaged`` under an unused name, and returns its new path."""
    aside = folder / "damaged"
    aside.mkdir(exist_ok=True)
    candidates = (str(step), *(f"{step}-{count}" for count in range(1, 10_000)))
    to = next(aside / name for name in candidates if not (aside / name).exists())
    os.rename(folder / str(step), to)
    return str(to)
