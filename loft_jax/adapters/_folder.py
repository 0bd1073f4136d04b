"""Writes the files of a folder together: all of them appear, or none."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path


@contextlib.contextmanager
def replacing(folder: Path, stale: Sequence[str] = ()) -> Iterator[Path]:
    """A temporary folder whose files appear in `folder` together, if there was no exception.

    Files of the patterns `stale` disappear with the replaced ones: those of a former save that has
    more files.

    A new folder appears by one rename. In an existing folder the old files of the same names move
    out before the new ones move in, and move back if that fails. So at no time is an old file next
    to a new one.
    """
    exists = folder.exists()
    parent = folder if exists else folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    temporary = parent / f".saving-{uuid.uuid4().hex}"  # on the same file system
    temporary.mkdir()  # with the mode of the umask, unlike tempfile.mkdtemp
    try:
        yield temporary
        if exists:
            _replace_files(temporary, folder, stale)
        else:
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace_files(new: Path, folder: Path, stale: Sequence[str]) -> None:
    names = sorted(file.name for file in new.iterdir())
    leaving = {file.name for pattern in stale for file in folder.glob(pattern)}
    leaving |= {name for name in names if (folder / name).exists()}
    old = new / "old"
    old.mkdir()
    try:
        for name in sorted(leaving):
            os.replace(folder / name, old / name)
        for name in names:
            os.replace(new / name, folder / name)
    except BaseException:
        for file in old.iterdir():
            file.rename(folder / file.name)
        raise


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A temporary file that replaces `path` by one rename, if there was no exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".saving-{uuid.uuid4().hex}"  # on the same file system
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
