"""A sample of `system_calls.py`: file system calls of a save that fail, or at which it dies."""

import pytest
import system_calls


def test_no_call_that_fails_or_kills_costs_more_than_the_save(tmp_path, fault):
    library = system_calls.build(tmp_path)
    if library is None:
        pytest.skip("a C compiler and Linux are needed")
    found = system_calls.run(library, every=40)
    for kind, outcomes in found["outcomes"].items():
        lost = {text: times for text, times in outcomes.items() if not text.startswith("survived")}
        assert outcomes and not lost, f"{kind}: {lost}"
        fault(
            "a file system call " + ("fails" if kind != "killed" else "kills"),
            f"{kind}, {sum(outcomes.values())} of {sum(found['calls'].values())} calls",
            "restores a complete checkpoint, and saves again",
            "at most that save",
        )
