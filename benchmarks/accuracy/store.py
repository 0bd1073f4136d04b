"""The results: one JSON file a run, shared by all experiments.

A run lies at RESULTS/TASK/METHOD/r4-lr1e-03-seed0.json; without a rank where nothing has one, and
without a learning rate where nothing is trained. Where it lies is what it is: a run that has a file
is not made again.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from accuracy.config import Cell, Task

from examples.common.errors import UserError

Record = Mapping[str, Any]


class Key(NamedTuple):
    """Which run."""

    cell: Cell
    rate: float | None
    seed: int


def path_of(root: Path, key: Key) -> Path:
    """The file of a run.

    Example:
      >>> path_of(Path("results"), Key(Cell("wikitext2", "lora", 4), 1e-3, 0)).as_posix()
      'results/wikitext2/lora/r4-lr1e-03-seed0.json'
    """
    task, method, rank = key.cell
    parts = [
        *([] if rank is None else [f"r{rank}"]),
        *([] if key.rate is None else [f"lr{key.rate:.0e}"]),
        f"seed{key.seed}",
    ]
    return root / task / method / ("-".join(parts) + ".json")


def write(root: Path, key: Key, record: Record) -> None:
    """Writes the file of a run whole or not at all."""
    path = path_of(root, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    named = {**key.cell._asdict(), "rate": key.rate, "seed": key.seed, **record}
    lines = [f"  {json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in named.items()]
    partial = path.with_suffix(".partial")
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    os.replace(partial, path)


def read(root: Path, task: Task | None = None) -> dict[Key, Record]:
    """All runs, or those of one task, which must have been made as the task now says."""
    found = {}
    for path in sorted(root.glob(f"{task.name if task else '*'}/*/*.json")):
        try:
            record = json.loads(path.read_text())
            cell = Cell(record["task"], record["method"], record["rank"])
            found[Key(cell, record["rate"], record["seed"])] = record
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} is no result of this study ({error}): remove it.") from error
        if task is not None and record["settings"] != task.settings():
            raise UserError(
                f"{path} was made with other settings than tasks/{task.name}.toml has now: give "
                "another --results, or remove the results of this task."
            )
    return found


def loss_of(record: Record) -> float:
    """The validation loss, infinite for a run that diverged."""
    validation = record["validation"]
    return math.inf if validation is None else validation["loss"]


def rounded(value: float, digits: int = 5) -> float | None:
    """A number as the files have it: None if it is not finite."""
    return round(value, digits) if math.isfinite(value) else None
