"""The folder of a run's checkpoints, as process 0 sees it."""

import os
import shutil
from pathlib import Path


def steps(folder: Path) -> list[int]:
    """The steps in a folder; what is half written has a longer name."""
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir() if path.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)


def record_text(folder: Path, step: int) -> str | None:
    """The record of a step as it is on disk, None if it has none."""
    try:
        # As Orbax lays out a JSON item. A flipped bit may leave no valid UTF-8.
        return (folder / str(step) / "meta" / "metadata").read_text("utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None


def names(folder: Path) -> list[str] | None:
    """What is in a folder, None if there is no such folder."""
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else None


def set_aside(folder: Path) -> list[str]:
    """What has been moved out of the way for being damaged."""
    return names(folder / "damaged") or []


def make(folder: Path) -> None:
    """Makes the folder if need be, and sees that it may be written to."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(13, "no permission to write", str(folder))


def clear_half_written(folder: Path) -> None:
    """Deletes what killed saves left, under the name that Orbax gives a step until it is whole."""
    for path in folder.glob("*.orbax-checkpoint-tmp*"):
        if path.is_dir():
            shutil.rmtree(path)


def move_to_damaged(folder: Path, step: int) -> str:
    """Moves a checkpoint out of the way, and says where to; nothing is overwritten."""
    aside = folder / "damaged"
    aside.mkdir(exist_ok=True)
    candidates = (str(step), *(f"{step}-{count}" for count in range(1, 10_000)))
    to = next(aside / name for name in candidates if not (aside / name).exists())
    os.rename(folder / str(step), to)
    return str(to)
