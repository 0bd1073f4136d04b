"""What a run is asked to do: the settings that all examples share, and their command line."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from errors import UserError
from methods import METHODS, default_rate
from runs import Run

S = TypeVar("S", bound="Settings")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run computes; kept in its folder, and fixed for its lifetime."""

    full_rate: ClassVar[float] = 1e-4
    """Full fine-tuning's peak learning rate on the task, from which those of all methods follow."""
    rates: ClassVar[Mapping[str, float]] = {}
    """Peaks of the methods for which the task wants others than follow from `full_rate`."""

    method: str = "loft"
    model: str | None = None
    data: str | None = None
    eval_data: str | None = None
    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ()
    learning_rate: float | None = None
    steps: int = 60
    batch_size: int = 4
    eval_every: int = 15
    save_every: int = 15
    seed: int = 0

    @property
    def peak(self) -> float:
        """The learning rate at its highest."""
        return self.learning_rate or self.default_peak(self.method)

    @classmethod
    def default_peak(cls, method: str) -> float:
        """A method's peak learning rate where none is given."""
        return cls.rates.get(method, default_rate(method, cls.full_rate))


def make_parser(
    description: str, defaults: Settings, targets: Mapping[str, Any]
) -> argparse.ArgumentParser:
    """The flags that all examples share, but for those of their data.

    Flags left out are absent from the result: their defaults are the settings'.

    Args:
        description: one line.
        defaults: the settings that no flag changes.
        targets: the layers that can carry an adapter, by their short names.
    """
    parser = argparse.ArgumentParser(description=description, argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("--method", choices=METHODS, metavar="NAME", help=f"{', '.join(METHODS)}; default loft")
    add("--rank", type=positive_int, help=f"default {defaults.rank}")
    add("--alpha", type=positive_float, help="the adapters' scale is alpha/rank; default rank")
    names = ",".join(targets)
    add(
        "--targets",
        type=lambda value: _targets(value, targets),
        help=f"of {names}; default {','.join(defaults.targets)}",
    )
    rates = ", ".join(f"{defaults.default_peak(name):g} for {name}" for name in METHODS)
    add("--learning-rate", type=positive_float, help=f"the peak; default {rates}")
    for name in ("steps", "batch_size", "eval_every", "save_every"):
        add_number(parser, defaults, name)
    add("--seed", type=int, help=f"default {defaults.seed}")
    add("--output", type=Path, help="folder for the results; default the next runs/METHOD-N")
    add("--resume", action="store_true", help="continue the run in --output where it stopped")
    return parser


def add_number(parser: argparse.ArgumentParser, defaults: Settings, name: str, what: str = ""):
    """A flag for one of the settings that are positive whole numbers."""
    help_ = "; ".join(part for part in (what, f"default {getattr(defaults, name)}") if part)
    parser.add_argument("--" + name.replace("_", "-"), type=positive_int, help=help_)


def parse(
    parser: argparse.ArgumentParser, kind: type[S], argv: Sequence[str] | None
) -> tuple[S, Path | None, bool]:
    """The settings, the output folder if one is named, and whether to resume the run in it.

    A resumed run takes its settings from its folder, so that `--resume --output FOLDER` is
    enough; whatever else is given must agree with them.
    """
    given = vars(parser.parse_args(argv))
    output, resume = given.pop("output", None), given.pop("resume", False)
    if not resume:
        return kind(**given), output, False
    if output is None:
        raise UserError("--resume needs --output with the folder of the run to continue.")
    settings = _read(kind, output)
    differ = [
        f"--{name.replace('_', '-')} was {_shown(getattr(settings, name))}, now {_shown(value)}"
        for name, value in given.items()
        if value != getattr(settings, name)
    ]
    if differ:
        raise UserError(
            f"The run in {output} cannot be resumed with other settings ({'; '.join(differ)}): "
            "leave these flags out, or start a new run in another --output."
        )
    return settings, output, True


def _read(kind: type[S], output: Path) -> S:
    """The settings of the run in a folder."""
    saved = Run.settings(output)["settings"]
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := set(saved) - known:
        raise UserError(
            f"The run in {output} was begun by another script or version (its settings.json has "
            f"{', '.join(sorted(unknown))}): resume it with that one."
        )
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value  # JSON has lists alone
        for name, value in saved.items()
    }
    return kind(**values)


def _shown(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def positive_int(value: str) -> int:
    """A flag's value, a whole number from 1 on."""
    if not value.isdigit() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not a positive whole number")
    return int(value)


def positive_float(value: str) -> float:
    """A flag's value, a finite number above 0."""
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{value!r} is not a positive number")
    return number


def _targets(value: str, known: Mapping[str, Any]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(value.split(",")))
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {','.join(known)}")
    return names
