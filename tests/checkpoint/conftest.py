"""Fixtures. `tiny_run.py` has the runs that these tests start, kill and resume."""

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def fault(report):
    """Adds a line to the table of faults: fault, how it was injected, outcome, loss."""
    widths = (40, 48, 60, 0)

    def add(*cells: str) -> None:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        report("checkpoints: " + " | ".join(padded))

    return add


@pytest.fixture
def dropped_io_ends():
    """Waits for reads and writes that Orbax abandoned after a failure.

    Nothing receives their errors, and pytest would attribute the warning to the next test.
    """
    yield
    time.sleep(0.1)
