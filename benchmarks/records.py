"""Measured rows as JSON lines, each with the machine and the versions that it belongs to."""

import json
import os
import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

Row = dict[str, Any]


def here() -> dict[str, str]:
    """The machine and the versions."""
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
    """Appends rows, each with `here`, to a JSON-lines file; does nothing without a path."""
    if path is None:
        return
    with path.open("a") as file:
        file.writelines(json.dumps({**row, **here()}) + "\n" for row in rows)


def read(path: Path) -> list[Row]:
    """The rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
