"""A run with renewals that is killed and resumed is bit-identical to an uninterrupted one."""

import subprocess
import sys
from pathlib import Path

SCRIPT = str(Path(__file__).with_name("renewed_run.py"))
STEPS = 1000  # and 20 renewals


def test_a_killed_run_with_renewals_ends_where_an_uninterrupted_one_does(tmp_path):
    start = lambda: subprocess.Popen(
        [sys.executable, SCRIPT, str(tmp_path), str(STEPS)], stdout=subprocess.PIPE, text=True
    )
    with start() as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "resumed 0\n"
        while killed.stdout.readline() != "saved 420\n":
            assert killed.poll() is None
        killed.kill()
        killed.stdout.read()
    with start() as resumed:
        lines = resumed.communicate()[0].splitlines()
    assert int(lines[0].removeprefix("resumed ")) >= 420
    assert lines[-2].removeprefix("this run ") == lines[-1].removeprefix("uninterrupted run ")
