"""Times of several functions, measured in alternation after a warm-up."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"


def in_alternation(
    steps: Mapping[str, Callable[[], Any]], runs: int, warmup: int = 2
) -> dict[str, np.ndarray]:
    """Calls all steps once a round, and returns the seconds of each in the last ``runs`` rounds.

    Noise of a shared machine then affects all of them alike. Every other round runs in reverse
    order, so that no step always follows the same other one.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for run in range(warmup + runs):
        for name in reversed(list(steps)) if run % 2 else steps:
            began = time.perf_counter()
            steps[name]()
            if run >= warmup:
                times[name].append(time.perf_counter() - began)
    return {name: np.array(x) for name, x in times.items()}


def quartiles(times: np.ndarray) -> list[float]:
    """First quartile, median and third quartile, in milliseconds."""
    return [round(float(x) * 1e3, 2) for x in np.quantile(times, (0.25, 0.5, 0.75))]


def paired_ratio(times: np.ndarray, base: np.ndarray) -> list[float]:
    """Quartiles and median of the ratio within each round, in which shared noise cancels."""
    return [round(float(x), 3) for x in np.quantile(times / base, (0.25, 0.5, 0.75))]
