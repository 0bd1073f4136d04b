"""The settings that all examples share, and their command line."""

import argparse
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, get_args

from .config_files import read_config
from .errors import UserError
from .methods import METHODS, default_learning_rate
from .runs import read_settings
from .schedules import Schedule, learning_rate_at
from .trackers import PACKAGES, check_installed

S = TypeVar("S", bound="Settings")


class Flags(Protocol):
    """A parser, or a group of its flags."""

    def add_argument(self, *names: str, **options: Any) -> argparse.Action: ...


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a run; they are saved in its folder and never change."""

    full_learning_rate: ClassVar[float] = 1e-4
    """Peak learning rate of full fine-tuning on the task, from which the others follow."""
    learning_rates: ClassVar[Mapping[str, float]] = {}
    """Peak learning rates of methods for which the task needs another value."""

    method: str = "loft"
    model: str | None = None
    data: str | None = None
    eval_data: str | None = None
    test_data: tuple[str, ...] = ()
    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ()
    dropout: float = 0.0
    learning_rate: float | None = None
    warmup: float = 0.1
    schedule: Schedule = "linear"
    weight_decay: float = 0.0
    clip: float = 1.0
    steps: int = 60
    epochs: float | None = None
    batch_size: int = 4
    accumulate: int = 1
    eval_every: int = 15
    save_every: int = 15
    seed: int = 0
    log_to: tuple[str, ...] = ()
    merge: bool = False

    @property
    def peak(self) -> float:
        """The peak learning rate."""
        return self.learning_rate or self.default_peak(self.method)

    @property
    def max_norm(self) -> float | None:
        """The norm at which gradients are clipped; None does not clip."""
        return self.clip or None

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        return learning_rate_at(step, self.steps, self.peak, self.warmup, self.schedule)

    def for_epochs(self: S, examples: int) -> S:
        """The settings with the steps of `--epochs` over so many examples, if it is given."""
        if self.epochs is None:
            return self
        steps = math.ceil(self.epochs * examples / self.batch_size)
        return dataclasses.replace(self, steps=steps)

    @classmethod
    def default_peak(cls, method: str) -> float:
        """A method's default peak learning rate."""
        default = default_learning_rate(method, cls.full_learning_rate)
        return cls.learning_rates.get(method, default)


def make_parser(
    description: str,
    defaults: Settings,
    targets: Mapping[str, Any],
    methods: Iterable[str] = METHODS,
) -> argparse.ArgumentParser:
    """A parser with the flags that all examples share.

    The result of parsing contains only the flags that were given.

    Args:
        description: one line.
        defaults: the default settings.
        targets: the layers that can have an adapter, by short name.
        methods: the choices of `--method`.
    """
    methods = tuple(methods)
    parser = argparse.ArgumentParser(
        description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    add = parser.add_argument_group("method").add_argument
    add("--method", choices=methods, metavar="NAME", help=f"{', '.join(methods)}; default loft")
    add("--rank", type=positive_int, help=f"rank of the adapters; default {defaults.rank}")
    add("--alpha", type=positive_float, help="adapters are scaled by alpha/rank; default rank")
    add(
        "--targets",
        type=lambda value: _targets(value, targets),
        help=f"layers to adapt: {','.join(targets)}; default {','.join(defaults.targets)}",
    )
    add("--dropout", type=fraction, help="of the adapters' input in training; default 0")
    group = parser.add_argument_group("optimization")
    add = group.add_argument
    shown = ("loft", "lora", "full")
    peaks = ", ".join(f"{defaults.default_peak(name):g} for {name}" for name in shown)
    add(
        "--learning-rate",
        type=positive_float,
        help=f"peak learning rate; default {peaks}, and others for other methods",
    )
    add(
        "--warmup",
        type=non_negative_float,
        help="steps in which the learning rate rises; below 1, a fraction of the steps; default "
        f"{defaults.warmup}",
    )
    add(
        "--schedule",
        choices=get_args(Schedule),
        help=f"the learning rate after the warm-up; default {defaults.schedule}",
    )
    add("--weight-decay", type=non_negative_float, help="decoupled, as in AdamW; default 0")
    add(
        "--clip",
        type=non_negative_float,
        help=f"norm at which gradients are clipped, 0 for none; default {defaults.clip:g}",
    )
    add_number(group, defaults, "steps", "training steps")
    add("--epochs", type=positive_float, help="passes over the data; default from --steps")
    add_number(group, defaults, "batch_size", "examples per step")
    add_number(group, defaults, "accumulate", "parts of a batch, computed one after another")
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--config", type=Path, help="TOML or JSON file with settings; flags take precedence")
    add_number(group, defaults, "eval_every", "steps between evaluations")
    add_number(group, defaults, "save_every", "steps between checkpoints")
    add("--seed", type=int, help=f"of adapters, batches and samples; default {defaults.seed}")
    add(
        "--merge",
        action=argparse.BooleanOptionalAction,
        help="also write the whole trained model, with its adapters merged, for transformers",
    )
    add("--log-to", type=names, help="also log the metrics to " + ", ".join(PACKAGES))
    add("--output", type=Path, help="folder for the results; default the next runs/METHOD-N")
    add("--resume", action="store_true", help="continue the run in --output")
    return parser


def add_number(group: Flags, defaults: Settings, name: str, what: str) -> None:
    """Adds the flag of a setting that is a positive integer to a parser or to a group of flags."""
    help_ = f"{what}; default {getattr(defaults, name)}"
    group.add_argument("--" + name.replace("_", "-"), type=positive_int, help=help_)


def parse(
    parser: argparse.ArgumentParser, kind: type[S], argv: Sequence[str] | None
) -> tuple[S, Path | None, bool]:
    """The settings, the output folder if one is given, and whether to resume the run in it.

    A flag takes precedence over the same setting in the file of `--config`. A resumed run takes its
    settings from its folder, so `--resume --output FOLDER` is enough. Any other flags must agree
    with these settings.
    """
    given = vars(parser.parse_args(argv))
    if (config := given.pop("config", None)) is not None:
        given = read_config(config, parser, kind) | given
    settings, output, resume = _settings(given, kind)
    if settings.batch_size % settings.accumulate:
        raise UserError(
            f"--accumulate {settings.accumulate} does not divide --batch-size "
            f"{settings.batch_size}: choose a divisor."
        )
    check_decay(settings, settings.method)
    if settings.dropout and METHODS[settings.method].trains != "adapters":
        raise UserError(
            f"--dropout is for adapters, and --method {settings.method} has none: remove the flag."
        )
    if settings.merge and METHODS[settings.method].trains in ("prompts", "bottlenecks"):
        raise UserError(
            f"--merge: what --method {settings.method} adds is no part of the weights. Remove it."
        )
    check_installed(settings.log_to)
    return settings, output, resume


def check_decay(settings: Settings, method: str) -> None:
    """Raises an error if a method has no weight decay, and there should be some."""
    if settings.weight_decay and not METHODS[method].decays:
        raise UserError(
            f"--weight-decay: {METHODS[method].label} has none. Remove the flag, or the method."
        )


def _settings(given: dict[str, Any], kind: type[S]) -> tuple[S, Path | None, bool]:
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
            "remove these flags, or start a new run in another --output."
        )
    return settings, output, True


def _read(kind: type[S], output: Path) -> S:
    """The settings of the run in a folder."""
    saved = read_settings(output)["settings"]
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := set(saved) - known:
        raise UserError(
            f"Another script or version started the run in {output} (its settings.json has "
            f"{', '.join(sorted(unknown))}): resume it with that one."
        )
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value  # JSON has no tuples
        for name, value in saved.items()
    }
    return kind(**values)


def _shown(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def positive_int(value: str) -> int:
    """Parses a flag's value as a positive integer."""
    if not value.isdigit() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not a positive integer")
    return int(value)


def positive_float(value: str) -> float:
    """Parses a flag's value as a positive finite number."""
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{value!r} is not a positive number")
    return number


def non_negative_float(value: str) -> float:
    """Parses a flag's value as a finite number that is positive or zero."""
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{value!r} is not zero or a positive number")
    return number


def fraction(value: str) -> float:
    """Parses a flag's value as a number from 0 to 1, and not 1."""
    number = non_negative_float(value)
    if number >= 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not below 1")
    return number


def names(value: str) -> tuple[str, ...]:
    """Parses a flag's value as names that commas separate."""
    return tuple(value.split(","))


def _targets(value: str, known: Mapping[str, Any]) -> tuple[str, ...]:
    targets = tuple(dict.fromkeys(names(value)))
    if unknown := [name for name in targets if name not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {','.join(known)}")
    return targets
