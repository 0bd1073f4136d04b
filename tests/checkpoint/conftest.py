"""The runs that these tests start, kill and resume are in `tiny_run.py`."""

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def fault(report):
    """Adds a line to the table of faults: the fault, how it was made, what came of it, the loss."""
    widths = (40, 48, 60, 0)

    def add(*cells: str) -> None:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        report("checkpoints: " + " | ".join(padded))

    return add


@pytest.fixture
def dropped_io_ends():
    """Lets what a failed read or write left behind end in the test that made it fail.

    Orbax drops the other reads and writes, and TensorStore then finds nobody to tell of their end:
    pytest would hold that against the next test.
    """
    yield
    time.sleep(0.1)
