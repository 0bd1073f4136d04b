"""Runs that are killed, preempted and resumed in new processes end where undisturbed ones do."""

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


def environment(cache: Path) -> dict[str, str]:
    """One device, one thread, and programs that are compiled once for all processes."""
    kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return kept | {"OPENBLAS_NUM_THREADS": "1", "TINY_RUN_CACHE": str(cache)}


def run(cache: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(
        command, env=environment(cache), capture_output=True, text=True, timeout=300
    )


def test_a_resumed_run_equals_one_in_one_go_to_the_bit(tmp_path, fault):
    """2k steps, and k steps, a save, a new process and k steps, for each optimizer and each k."""
    outputs = []
    for command in ("continuous", "resumed"):
        done = run(tmp_path / "cache", command, str(tmp_path / "runs"))
        assert done.returncode == 0, done.stderr
        outputs.append(json.loads(done.stdout))
    whole, resumed = outputs
    assert len(resumed) == 30 and len(set(whole.values())) == len(whole)
    assert {name: whole[name] for name in resumed} == resumed
    fault("end of the process", f"{len(resumed)} runs of 10 optimizers", "equal to the bit", "-")


def test_sigterm_is_answered_with_a_save_and_the_exit_code(tmp_path, fault):
    command = [sys.executable, SCRIPT, "until-preempted", str(tmp_path / "run"), "1000000"]
    with subprocess.Popen(
        command, env=environment(tmp_path / "cache"), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line)["step"] >= 5:
                process.send_signal(signal.SIGTERM)
                break
        last = json.loads(process.stdout.read().splitlines()[-1])
    assert process.returncode == 75
    assert last["saved"] >= 5
    done = run(tmp_path / "cache", "until-preempted", str(tmp_path / "run"), str(last["saved"] + 5))
    assert done.returncode == 0, done.stderr
    after = json.loads(done.stdout.splitlines()[-1])
    assert after["resumed"] == last["saved"]
    assert after["fingerprint"] == after["uninterrupted"]
    fault("preemption", "SIGTERM in training", "saves, exits with 75, resumes", "nothing")


class Zygote:
    """Forks runs, and reads what they tell."""

    def __init__(self, cache: Path):
        self.process = subprocess.Popen(
            [sys.executable, SCRIPT, "zygote"],
            env=environment(cache),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._rest = b""
        self.child: int | None = None

    def order(self, **settings) -> int:
        """Starts a run and returns its process id."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(settings).encode() + b"\n")
        self.process.stdin.flush()
        kind, pid = self.line().split()
        assert kind == "pid"
        self.child = int(pid)
        return self.child

    def line(self, timeout: float = 120.0) -> str:
        """The next line; empty if none comes in time."""
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
            self.child = None  # its number may be another process' by now
        return line.decode()


@pytest.fixture
def zygote(tmp_path):
    zygote = Zygote(tmp_path / "cache")
    assert zygote.line() == "ready"
    yield zygote
    if zygote.child is not None:  # of a test that failed
        with contextlib.suppress(ProcessLookupError):
            os.kill(zygote.child, signal.SIGKILL)
    with contextlib.suppress(BrokenPipeError):
        zygote.process.communicate(timeout=60)


def test_no_kill_at_any_moment_costs_more_than_the_steps_since_the_last_save(
    zygote, tmp_path, fault
):
    folder, draw = str(tmp_path / "run"), random.Random(0)
    settings = {"folder": folder, "until": 1200, "save_every": 2, "pause": 0.01}
    whole, during, resumed_at = 0, {"train": 0, "save": 0}, []
    delays = {"train": 0.03, "save": 0.2}  # about as long as each takes
    half_written = 0
    for kill in range(KILLS):
        pid = zygote.order(**settings, asynchronous=bool(kill % 2))
        phase, turn = draw.choice(("train", "save", "save")), draw.randint(1, 2)
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
                assert resumed_at[-1] >= whole, f"step {whole} was saved, and is lost"
            elif said == "saved":
                whole = int(line.split()[1])
            assert said not in ("ended", "done"), f"the run ended by itself: {line}"
            if said == phase and deadline is None:
                seen += 1
                if seen == turn:
                    deadline = time.monotonic() + draw.uniform(0.0, delays[phase])
        # What it still said before it died is what it was doing.
        while not (line := zygote.line()).startswith("ended"):
            said = line.split()[0]
            if said == "saved":
                whole = int(line.split()[1])
        assert line == f"ended {-signal.SIGKILL}", line
        during["save" if said == "save" else "train"] += 1
        half_written += any(Path(folder).glob("*orbax-checkpoint-tmp*"))
    assert sum(during.values()) >= 50
    assert min(during.values()) >= 10, during

    # It ends where a run ends that nobody disturbed.
    last = settings | {"until": whole + 10, "save_every": 5, "pause": 0.0, "asynchronous": False}
    prints = []
    for place in (folder, str(tmp_path / "undisturbed")):
        zygote.order(**last | {"folder": place, "save_every": 5 if place == folder else 10_000})
        while (line := zygote.line()) and not line.startswith("ended"):
            if line.startswith("done"):
                prints.append(line)
        assert line == "ended 0", line
    assert len(prints) == 2 and prints[0] == prints[1]
    assert not list(Path(folder).glob("damaged/*"))
    fault(
        "SIGKILL in a save",
        f"{during['save']} times, {half_written} with a half-written folder",
        "resumes, equal to the bit",
        "steps since the last save",
    )
    fault(
        "SIGKILL in training",
        f"{during['train']} times, in a run of {whole} steps",
        "resumes, equal to the bit",
        "steps since the last save",
    )
