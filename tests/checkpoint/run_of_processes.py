"""Runs of four processes, in which one is slow, out of disk, preempted or killed.

`run_of_processes.py FOLDER PHASE...` forks four processes for each phase in turn, so that they do
not pay for imports. For each phase it prints what the processes told and their exit codes as JSON.
"""

import contextlib
import json
import os
import resource
import signal
import socket
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a fork does not copy threads

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from loft_jax.checkpoint import (
    CheckpointError,
    Checkpoints,
    Preemption,
    UndeletedCheckpointWarning,
    _folder,
    _storage,
)

PROCESSES = 4
TIMEOUT_S, HEARTBEAT_S = 5, 10
SLOW, WITHOUT_DISK, PREEMPTED, KILLED = 1, 2, 3, 3


class Process:
    """One process of the run."""

    def __init__(self, rank: int, checkpoints: Checkpoints):
        self.rank, self.checkpoints = rank, checkpoints
        self.told: list[Any] = []
        place = NamedSharding(jax.make_mesh((PROCESSES,), ("x",)), P("x"))
        self.values = jax.jit(lambda k: jnp.arange(1024.0) + k, out_shardings=place)
        self.total = jax.jit(jnp.sum)

    def state(self, step: int) -> dict[str, Any]:
        return {"adapter": {"w": self.values(step)}, "opt_state": {"n": step}}

    def save(self, step: int) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                self.checkpoints.save(step, **self.state(step))
                if self.rank == SLOW:
                    time.sleep(0.5)
                self.checkpoints.wait()
                self.told.append(f"{step} saved")
            except CheckpointError as error:
                assert f"step {step} could not be saved" in str(error), error
                self.told.append(f"{step} failed")
        kinds = {warning.category for warning in caught}
        self.told += ["undeleted"] * (UndeletedCheckpointWarning in kinds)

    def restore(self) -> None:
        found = self.checkpoints.restore(**self.state(0))
        assert found.opt_state["n"] == found.step
        offset = float(self.total(found.adapter["w"] - self.values(0))) / 1024
        self.told.append([found.step, offset])


def fails(*_: Any) -> None:
    raise OSError(28, "No space left on device")


@contextlib.contextmanager
def patched(where: Any, name: str, value: Any, here: bool = True):
    before = getattr(where, name)
    setattr(where, name, value if here else before)
    yield
    setattr(where, name, before)


@contextlib.contextmanager
def without_disk(here: bool):
    """Lets each write to a file fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]) if here else before)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def failures(process: Process) -> None:
    """Saves 1 to 4, with failures of single processes, and stops together on SIGTERM."""
    process.save(1)
    with patched(_folder, "publish", fails, process.rank == 0):
        process.save(2)
    with without_disk(process.rank == WITHOUT_DISK):
        process.save(2)
    process.save(2)
    with patched(_folder, "delete", lambda *_: ["1: it stays"], process.rank == 0):
        process.save(3)
    process.save(4)
    process.told.append(list(process.checkpoints.steps()))
    process.restore()
    with Preemption() as preemption:
        for step in range(5, 1000):
            if step == 7 and process.rank == PREEMPTED:
                os.kill(os.getpid(), signal.SIGTERM)
            if preemption.reached(step):
                process.save(step)
                break
            time.sleep(0.01)


def killed_before_writing(process: Process) -> None:
    process.restore()
    with patched(_storage, "begin_together", die, process.rank == KILLED):
        process.save(process.checkpoints.latest_step() + 1)


def killed_while_writing(process: Process) -> None:
    process.restore()
    process.save(process.checkpoints.latest_step() + 1)
    begin = _storage.begin_together

    def begin_and_die(*args: Any) -> Any:
        begin(*args)
        return die

    with patched(_storage, "begin_together", begin_and_die, process.rank == KILLED):
        process.save(process.checkpoints.latest_step() + 1)


def resumed(process: Process) -> None:
    process.restore()
    process.save(process.checkpoints.latest_step() + 1)
    process.restore()


PHASES = {f.__name__: f for f in (failures, killed_before_writing, killed_while_writing, resumed)}


def run(rank: int, port: int, folder: str, phase: str, told: Path) -> None:
    jax.distributed.initialize(
        f"localhost:{port}", PROCESSES, rank, heartbeat_timeout_seconds=HEARTBEAT_S
    )
    process = None
    try:
        with Checkpoints(folder, keep=1, timeout_s=TIMEOUT_S) as checkpoints:
            process = Process(rank, checkpoints)
            PHASES[phase](process)
    except BaseException as error:
        told.write_text(json.dumps([*(process.told if process else []), type(error).__name__]))
        raise
    told.write_text(json.dumps(process.told))


def main(folder: str, phases: list[str]) -> None:
    for phase in phases:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        files = [Path(folder).with_name(f"{phase} {rank}") for rank in range(PROCESSES)]
        children = []
        for rank, file in enumerate(files):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    run(rank, port, folder, phase, file)
                    code = 0
                except BaseException as error:
                    print(phase, rank, repr(error)[:400], file=sys.stderr, flush=True)
                os._exit(code)
            children.append(child)
        ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        told = [json.loads(file.read_text()) if file.exists() else [] for file in files]
        print(json.dumps({"ended": ended, "told": told}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
