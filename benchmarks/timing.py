"""Times of several things side by side: in alternation, after a warm-up, with their spread."""

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

RESULTS = Path(__file__).parent / "results"


def in_alternation(
    steps: Mapping[str, Callable[[], Any]], runs: int, warmup: int = 2
) -> dict[str, np.ndarray]:
    """Runs all steps in turn, ``warmup + runs`` times; returns the seconds of the last ``runs``.

    Noise of a shared machine then falls on all of them alike. Every other round goes backwards, so
    that none always runs after the same other one.
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
    """First quartile, median and third, in milliseconds."""
    return [round(float(x) * 1e3, 2) for x in np.quantile(times, (0.25, 0.5, 0.75))]


def paired_ratio(times: np.ndarray, base: np.ndarray) -> list[float]:
    """Quartiles and median of the ratio within each round: what both suffered alike cancels."""
    return [round(float(x), 3) for x in np.quantile(times / base, (0.25, 0.5, 0.75))]


def here() -> dict[str, str]:
    """The machine and the versions that a result belongs to."""
    device = jax.devices()[0]
    kind = _processor() if device.platform == "cpu" else device.device_kind
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "optax")}
    return {
        "machine": f"{kind}, {os.cpu_count()} cores",
        "python": platform.python_version(),
    } | versions


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def append(path: Path | None, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds rows to a JSON-lines file, each with where it was measured."""
    if path is None:
        return
    with path.open("a") as file:
        file.writelines(json.dumps({**row, **here()}) + "\n" for row in rows)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; of rows about the same thing the last."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]
