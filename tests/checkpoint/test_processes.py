"""Four processes of one run agree on each save, whichever is slow, out of disk or killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

SCRIPT = str(Path(__file__).with_name("run_of_processes.py"))
PROCESSES = 4


def test_whatever_happens_to_one_process_the_run_agrees_and_goes_on(tmp_path, fault):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    phases = ["failures", "killed_before_writing", "killed_while_writing", "resumed"]
    done = subprocess.run(
        [sys.executable, SCRIPT, str(tmp_path / "run"), *phases],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(phases), done.stderr
    failures, *killed, resumed = (json.loads(line) for line in lines)

    assert failures["ended"] == PROCESSES * [0], done.stderr
    (told,) = {json.dumps(one) for one in failures["told"]}  # all tell the same
    *told, preempted = json.loads(told)
    saves = ["1 saved", "2 failed", "2 failed", "2 saved", "3 saved", "undeleted", "4 saved"]
    assert told == [*saves, [4], [4, 4.0]]
    last = int(preempted.removesuffix(" saved"))
    assert last >= 7  # the step of the signal
    fault("process 0 cannot finish a save", "4 processes, one slow", "all tell it; goes on", "-")
    fault("process 2 has no disk", "RLIMIT_FSIZE of 0 in it", "all tell it; goes on", "that save")
    fault("preemption", "SIGTERM to process 3 of 4", f"all save step {last} and end", "nothing")

    # A process that JAX ends tells nothing.
    assert all(told[0] == [last, last] for told in killed[0]["told"] if told)
    last += 1  # the save before the kill
    for phase in killed:
        assert phase["ended"][-1] == -signal.SIGKILL
        assert all(code != 0 for code in phase["ended"])  # an error of JAX, or ours
        assert f"{last + 1} saved" not in [said for told in phase["told"] for said in told]
    assert resumed["ended"] == PROCESSES * [0], done.stderr
    expected = [[last, last], f"{last + 1} saved", [last + 1, last + 1]]
    assert resumed["told"] == PROCESSES * [expected]
    fault(
        "process 3 of 4 is killed in a save",
        "before and after it wrote its part",
        "all end; the next start resumes",
        "that save",
    )
