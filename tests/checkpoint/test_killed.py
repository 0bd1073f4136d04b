"""Killed, preempted and resumed runs are bit-identical to uninterrupted ones."""

import contextlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = str(Path(__file__).with_name("tiny_run.py"))
KILLS = 51


class Zygote:
    """A process that forks runs, and reads what they tell."""

    def __init__(self, cache: Path):
        # One device, one thread, and programs that are compiled once for all processes.
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        self.process = subprocess.Popen(
            [sys.executable, SCRIPT, str(cache)],
            env=environment | {"OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._rest = b""
        self.child: int | None = None

    def order(self, command: str, **settings) -> int:
        """Starts a run and returns its process id."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"command": command} | settings).encode() + b"\n")
        self.process.stdin.flush()
        kind, pid = self.line().split()
        assert kind == "pid"
        self.child = int(pid)
        return self.child

    def line(self, timeout: float = 120.0) -> str:
        """Returns the next line; empty if none comes in time."""
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        while b"\n" not in self._rest:
            if not select.select([descriptor], [], [], timeout)[0]:
                return ""
            got = os.read(descriptor, 4096)
            if not got:
                assert self.process.stderr is not None
                pytest.fail(self.process.stderr.read().decode())
            self._rest += got
        line, _, self._rest = self._rest.partition(b"\n")
        if line.startswith(b"ended"):
            self.child = None  # another process may reuse its number
        return line.decode()

    def lines(self, exit_code: int = 0) -> list[str]:
        """Returns the lines until the run ends with this code."""
        found = []
        while (line := self.line()) and not line.startswith("ended"):
            found.append(line)
        assert line == f"ended {exit_code}", (line, found)
        return found


@pytest.fixture(scope="module")
def shared_zygote(tmp_path_factory):
    zygote = Zygote(tmp_path_factory.mktemp("cache"))
    assert zygote.line() == "ready"
    yield zygote
    with contextlib.suppress(BrokenPipeError):
        zygote.process.communicate(timeout=60)


@pytest.fixture
def zygote(shared_zygote):
    yield shared_zygote
    if shared_zygote.child is not None:  # of a test that failed
        with contextlib.suppress(ProcessLookupError):
            os.kill(shared_zygote.child, signal.SIGKILL)
        while not shared_zygote.line().startswith("ended"):
            pass


def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(zygote, tmp_path, fault):
    """2k steps; and k steps, a save, a new process, k steps: for each optimizer and each k."""
    outputs = []
    for command in ("continuous", "resumed"):
        zygote.order(command, folder=str(tmp_path))
        (output,) = zygote.lines()
        outputs.append(json.loads(output))
    whole, resumed = outputs
    assert len(resumed) == 30 and len(set(whole.values())) == len(whole)
    assert {name: whole[name] for name in resumed} == resumed
    fault("end of the process", f"{len(resumed)} runs of 10 optimizers", "bit-identical", "-")


def test_sigterm_is_answered_with_a_save_and_the_exit_code(zygote, tmp_path, fault):
    pid = zygote.order("until_preempted", folder=str(tmp_path), until=1_000_000)
    while zygote.line() != "step 5":
        assert zygote.child is not None
    os.kill(pid, signal.SIGTERM)
    saved = int(zygote.lines(exit_code=75)[-1].removeprefix("saved "))
    assert saved >= 5
    zygote.order("until_preempted", folder=str(tmp_path), until=saved + 5)
    told = zygote.lines()
    assert told[0] == f"resumed {saved}"
    assert told[-2].removeprefix("resumed run ") == told[-1].removeprefix("uninterrupted run ")
    fault("preemption", "SIGTERM in training", "saves, exits with 75, resumes", "nothing")


def test_no_kill_at_any_moment_costs_more_than_the_steps_since_the_last_save(
    zygote, tmp_path, fault
):
    folder, draw = str(tmp_path / "run"), random.Random(0)
    settings = {
        "command": "killed_run",
        "folder": folder,
        "until": 1200,
        "save_every": 2,
        "pause": 0.01,
    }
    whole, during, resumed_at = 0, {"train": 0, "save": 0}, []
    delays = {"train": 0.03, "save": 0.2}  # about as long as each takes
    unfinished = 0
    for kill in range(KILLS):
        pid = zygote.order(**settings, asynchronous=bool(kill % 2))
        phase, count = draw.choice(("train", "save", "save")), draw.randint(1, 2)
        said, seen, deadline = "", 0, None
        while True:
            left = 120.0 if deadline is None else max(deadline - time.monotonic(), 0.0)
            line = zygote.line(left)
            if not line:
                assert deadline is not None, f"the run is stuck after {said!r}"
                os.kill(pid, signal.SIGKILL)
                break
            said = line.split()[0]
            if said == "resumed":
                resumed_at.append(int(line.split()[1]))
                assert resumed_at[-1] >= whole, f"step {whole} was saved and lost"
            elif said == "saved":
                whole = int(line.split()[1])
            assert said not in ("ended", "done"), f"the run ended by itself: {line}"
            if said == phase and deadline is None:
                seen += 1
                if seen == count:
                    deadline = time.monotonic() + draw.uniform(0.0, delays[phase])
        # Its last words before it died say what it was doing.
        while not (line := zygote.line()).startswith("ended"):
            said = line.split()[0]
            if said == "saved":
                whole = int(line.split()[1])
        assert line == f"ended {-signal.SIGKILL}", line
        during["save" if said == "save" else "train"] += 1
        unfinished += any(Path(folder).glob("*.saving-*"))
    assert sum(during.values()) >= 50
    assert min(during.values()) >= 10, during

    # It is bit-identical to an uninterrupted run.
    last = settings | {"until": whole + 10, "save_every": 5, "pause": 0.0, "asynchronous": False}
    prints = []
    for place in (folder, str(tmp_path / "uninterrupted")):
        zygote.order(**last | {"folder": place, "save_every": 5 if place == folder else 10_000})
        prints += [line for line in zygote.lines() if line.startswith("done")]
    assert len(prints) == 2 and prints[0] == prints[1]
    assert not list(Path(folder).glob("damaged/*"))
    fault(
        "SIGKILL in a save",
        f"{during['save']} times, {unfinished} with an unfinished folder",
        "resumes, bit-identical",
        "steps since the last save",
    )
    fault(
        "SIGKILL in training",
        f"{during['train']} times, in a run of {whole} steps",
        "resumes, bit-identical",
        "steps since the last save",
    )
