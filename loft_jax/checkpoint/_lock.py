"""A lock on the folder of a run, so that only one run writes to it.

The lock is a file that exists as long as its run, created with ``O_EXCL``: also on file systems
without locks, only one of two creations succeeds. The holder renews the file's time in a thread.
"""

import contextlib
import datetime
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

NAME = "writer.lock"
RENEWAL_S = 10.0
# Three renewals, of which one may be late. A file system may also show a new time late.
PATIENCE_S = 35.0


class Lock:
    """The lock of one run. Of several processes, process 0 holds it.

    Args:
      folder: the folder of the run, which exists.
    """

    def __init__(self, folder: Path):
        self._path = folder / NAME
        self._token, self._process = secrets.token_hex(8), os.getpid()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, take_over: bool) -> str | None:
        """Acquires the lock, also from a run that died.

        A holder on this machine is dead if its process is. Of another machine, it is dead if it
        does not renew the lock while this method watches.

        Args:
          take_over: do not ask whether the holder is alive.

        Returns:
          None, or who holds the lock.
        """
        if not self._create():
            holder = self._read()
            if not take_over and (alive := self._is_held(holder)):
                return alive
            # Of two runs that both found the holder dead, one replaces the other's lock. That run
            # finds out at its next save, before it changes anything: see `lost_to`.
            other = self._path.with_name(f"{NAME}.{self._token}")
            other.write_text(self._text())
            os.replace(other, self._path)
        if self._thread is None:
            self._thread = threading.Thread(target=self._renew, name="checkpoint lock", daemon=True)
            self._thread.start()
        return None

    def lost_to(self) -> str | None:
        """Returns who has taken the lock over; None if this run still holds it.

        A lock that vanished, with its folder, is created again.
        """
        holder = self._read()
        if holder is None and self._create():
            return None
        return None if (holder or {}).get("token") == self._token else _name(holder)

    def release(self) -> None:
        """Releases the lock if this run still holds it. In a forked process, does nothing."""
        if os.getpid() != self._process:
            return
        self._stop.set()
        with contextlib.suppress(OSError):
            if (self._read() or {}).get("token") == self._token:
                self._path.unlink()

    def _create(self) -> bool:
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        try:
            with open(descriptor, "w") as file:
                file.write(self._text())
        except BaseException:
            self._path.unlink(missing_ok=True)
            raise
        return True

    def _text(self) -> str:
        since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return json.dumps(_this_process() | {"since": since, "token": self._token})

    def _read(self) -> dict[str, Any] | None:
        """Returns the holder; None without a lock. An unfinished lock has an unknown holder."""
        try:
            holder = json.loads(self._path.read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return holder if isinstance(holder, dict) else {}

    def _is_held(self, holder: dict[str, Any] | None) -> str | None:
        """Returns the name of the holder if it is alive, else None."""
        this = _this_process()
        if holder and all(holder.get(key) == this[key] for key in ("host", "machine")):
            pid = holder.get("process")
            alive = isinstance(pid, int) and _start_time(pid) == holder.get("started")
            return _name(holder) if alive else None
        first, end = self._renewed(), time.monotonic() + PATIENCE_S
        while (now := self._renewed()) == first:
            if time.monotonic() > end:
                return None
            time.sleep(min(RENEWAL_S, PATIENCE_S) / 10)
        return None if now is None else _name(self._read() or holder)

    def _renewed(self) -> int | None:
        """Returns the time of the file; None if it does not exist."""
        try:
            with self._path.open() as file:  # network file systems look anew when a file is opened
                return os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None

    def _renew(self) -> None:
        while not self._stop.wait(RENEWAL_S):
            with contextlib.suppress(OSError):  # a mount that is away for a moment
                if (self._read() or {}).get("token") == self._token:
                    os.utime(self._path)


def _name(holder: dict[str, Any] | None) -> str:
    if not holder:
        return "a run that has just begun"
    return f"process {holder.get('process')} on {holder.get('host')} since {holder.get('since')}"


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "process": os.getpid(),
        "started": _start_time(os.getpid()),
    }


def _machine() -> str:
    """Identifies the running system in which process numbers are unique, as far as known.

    Two machines or containers may have one host name, and a machine that was started again has
    other processes.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_time(pid: int) -> str | None:
    """Returns when a process started, in the system's own unit; None if it does not run.

    The number of a dead process may be given to another one.
    """
    try:
        # After the name, which may hold anything: state, parent, ..., start time (man 5 proc).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"
