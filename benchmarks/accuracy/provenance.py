"""Where a result comes from: the commit, the versions, the machine, the memory it took."""

import datetime
import functools
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import timing

ROOT = Path(__file__).parents[2]
CODE = (
    "loft_jax",
    "examples",
    "benchmarks",
    ":!benchmarks/results",
    ":!benchmarks/accuracy/results",
)
"""What a result depends on, as git's paths."""


@functools.cache
def commit() -> str | None:
    """The commit of the code, with a + if the code differs from it; None outside git.

    Found out once: the code that runs is the one that was there at the beginning.
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
    """Commit, versions, machine and the present date."""
    now = datetime.datetime.now(datetime.UTC)
    return {
        "commit": commit(),
        **timing.here(),
        "flax": metadata.version("flax"),
        "date": now.isoformat(timespec="minutes"),
    }


def reset_peak_memory() -> None:
    """Counts the peak of the memory from here on, where the system can: on Linux."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the peak is then the one since the process began


def peak_memory() -> int:
    """The largest resident memory of this process, bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
