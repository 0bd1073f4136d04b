"""The results of the study: a JSON-lines file per task, RESULTS/TASK.jsonl, one run per line.

All experiments share the runs of a task. A run that is in the file is not repeated. One process may
append to a file while others read it.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.accuracy.config import Cell, Task
from examples.common.errors import UserError

Record = Mapping[str, Any]


class Key(NamedTuple):
    """Identifies a run."""

    cell: Cell
    rate: float | None
    seed: int


def append(root: Path, key: Key, record: Record) -> None:
    """Adds a finished run to the file of its task and flushes it to the disk."""
    root.mkdir(parents=True, exist_ok=True)
    named = {**key.cell._asdict(), "rate": key.rate, "seed": key.seed, **record}
    line = json.dumps(named, allow_nan=False) + "\n"
    with (root / f"{key.cell.task}.jsonl").open("ab+") as file:
        _drop_partial_line(file)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read(root: Path, task: Task | None = None) -> dict[Key, Record]:
    """All runs, or those of one task.

    Raises:
        UserError: a line is not a result, or a run of `task` was made with other settings.
    """
    found = {}
    for path in [root / f"{task.name}.jsonl"] if task else sorted(root.glob("*.jsonl")):
        for number, line in enumerate(_complete_lines(path), 1):
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
                cell = Cell(record["task"], record["method"], record["rank"])
                found[Key(cell, record["rate"], record["seed"])] = record
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{where}, is not a result ({error}): delete the line.") from error
            if task is not None and record.get("settings") != task.settings():
                raise UserError(
                    f"{where}: this run was made with other settings than tasks/{task.name}.toml "
                    "has now. Pass another folder as --results, or delete the results of this task."
                )
    return found


def _complete_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, without a last one whose writer was killed or has not finished."""
    if path.exists():
        yield from path.read_bytes().split(b"\n")[:-1]


def _drop_partial_line(file: Any) -> None:
    """Removes what a killed writer left behind the last end of line."""
    file.seek(0)
    content = file.read()
    if len(content) > (kept := content.rfind(b"\n") + 1):
        file.truncate(kept)


def loss_of(record: Record) -> float:
    """The validation loss; infinite for a run that diverged."""
    validation = record["validation"]
    return math.inf if validation is None else validation["loss"]


def rounded(value: float, digits: int = 5) -> float | None:
    """A number as the files store it: None if it is not finite."""
    return round(value, digits) if math.isfinite(value) else None
