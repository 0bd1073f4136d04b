"""The origin of a result: commit, versions, machine and peak memory."""

import datetime
import functools
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from benchmarks import records

ROOT = Path(__file__).parents[2]
CODE = ("loft_jax", "examples", "benchmarks", ":!benchmarks/*/results")
"""The code that a result depends on, as git pathspecs."""


@functools.cache
def commit() -> str | None:
    """The commit of the code, with a + if the code differs from it; None outside git.

    The value is cached, because the process runs the code that was there when it started.
    """
    try:
        head = _git("rev-parse", "--short=12", "HEAD").strip()
        return head + ("+" if _git("status", "--porcelain", "--", *CODE).strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def origin() -> dict[str, str | None]:
    """Commit, versions, machine and date."""
    now = datetime.datetime.now(datetime.UTC)
    return {
        "commit": commit(),
        **records.here(),
        "flax": metadata.version("flax"),
        "date": now.isoformat(timespec="minutes"),
    }


def reset_peak_memory() -> None:
    """Restarts the measurement of the peak memory, on Linux."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the peak is then that of the whole process


def peak_memory() -> int:
    """The peak resident memory of this process, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
