"""Copies of a run's metrics for TensorBoard, trackio or Weights & Biases (`--log-to`)."""

import importlib.util
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from .errors import UserError

PACKAGES = {"tensorboard": "tensorboardX", "trackio": "trackio", "wandb": "wandb"}
"""The package that each tracker needs. The extra of this project has the tracker's name."""

PROJECT = "loft_jax"
"""The project of trackio and Weights & Biases that gets the runs."""


class Tracker(Protocol):
    """Receives the metrics of one run."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...
    def finish(self) -> None: ...


def check_installed(names: tuple[str, ...]) -> None:
    """Raises a `UserError` if a tracker is unknown or its package is missing."""
    for name in names:
        if name not in PACKAGES:
            raise UserError(f"--log-to {name}: choose from {', '.join(PACKAGES)}.")
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(
                f"--log-to {name} needs the package {PACKAGES[name]}: pip install -e '.[{name}]'."
            )


def open_tracker(
    name: str, folder: Path, identity: str, settings: Mapping[str, Any], first_step: int
) -> Tracker:
    """Begins the record of a run, or continues it.

    Args:
        name: one of `PACKAGES`.
        folder: of the run.
        identity: is unique to the run, and the same when it is resumed.
        settings: of the run, which trackio and Weights & Biases show.
        first_step: what an interrupted run has recorded from this step on will be replaced.
    """
    open_: Callable[..., Tracker] = {
        "tensorboard": _TensorBoard,
        "trackio": _open_trackio,
        "wandb": _open_wandb,
    }[name]
    return open_(folder, identity, settings, first_step)


class _TensorBoard:
    """Writes event files to `FOLDER/tensorboard`; see them with `tensorboard --logdir runs`."""

    def __init__(self, folder: Path, _: str, settings: Mapping[str, Any], first_step: int):
        self._writer = import_module("tensorboardX").SummaryWriter(
            str(folder / "tensorboard"),
            purge_step=first_step or None,
            filename_suffix=f".{first_step}",  # the time in the name has whole seconds only
        )
        if not first_step:
            table = "".join(f"| {key} | {value} |\n" for key, value in settings.items())
            self._writer.add_text("settings", f"| setting | value |\n|---|---|\n{table}", 0)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()


def _open_trackio(folder: Path, identity: str, settings: Mapping[str, Any], _: int) -> Any:
    name = f"{folder.name}-{identity}"
    return import_module("trackio").init(
        project=PROJECT, name=name, config=dict(settings), resume="allow", embed=False
    )


def _open_wandb(folder: Path, identity: str, settings: Mapping[str, Any], _: int) -> Any:
    return import_module("wandb").init(
        project=PROJECT,
        name=folder.name,
        id=identity,
        dir=str(folder),
        config=dict(settings),
        resume="allow",
    )


def numbers_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in a line of metrics.jsonl, by names that tell the evaluated sets apart.

    Example:
        >>> numbers_of({"step": 5, "tested": "photos", "accuracy": 0.5, "of_class": {"cat": 1}})
        {'photos/accuracy': 0.5, 'photos/of_class/cat': 1.0}
    """
    found: dict[str, float] = {}
    prefix = record.get("answered", record.get("tested"))
    for key, value in record.items():
        name = key if prefix is None else f"{prefix}/{key}"
        if isinstance(value, Mapping):
            found |= {f"{name}/{part}": float(number) for part, number in value.items()}
        elif isinstance(value, int | float) and key != "step":
            found[name] = float(value)
    return found
