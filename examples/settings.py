"""What `finetune_llm.py` can be asked to do: its settings and its command line."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from errors import UserError
from llama import TARGETS
from runs import Run
from training import LEARNING_RATES, METHODS


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run computes; kept in its folder, and fixed for its lifetime."""

    method: str = "loft"
    second_moment: Literal["calibrated", "factored", "diagonal"] = "calibrated"
    model: str | None = None
    data: str | None = None
    eval_data: str | None = None
    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ("q", "k", "v", "up", "down")
    quantize: Literal["nf4", "int4", "int8"] | None = None
    tile_size: int = 64
    learning_rate: float | None = None
    steps: int = 60
    batch_size: int = 4
    seq_len: int = 128
    eval_windows: int = 48
    eval_every: int = 15
    save_every: int = 15
    seed: int = 0
    prompt: str = "The history of the city"

    @property
    def peak(self) -> float:
        """The learning rate at its highest."""
        return self.learning_rate or LEARNING_RATES[self.method]


def parse_arguments(argv: Sequence[str] | None) -> tuple[Settings, Path | None, bool]:
    """The settings, the output folder if one is named, and whether to resume the run in it.

    A resumed run takes its settings from its folder, so that `--resume --output FOLDER` is
    enough; whatever else is given must agree with them.
    """
    given = vars(_parser().parse_args(argv))
    output, resume = given.pop("output", None), given.pop("resume", False)
    if given.get("method") == "full" and given.get("quantize"):
        raise UserError("--quantize is for frozen weights: --method full trains all of them.")
    if not resume:
        return Settings(**given), output, False
    if output is None:
        raise UserError("--resume needs --output with the folder of the run to continue.")
    saved = Run.settings(output)["settings"]
    settings = Settings(**saved | {"targets": tuple(saved["targets"])})
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


def _shown(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _parser() -> argparse.ArgumentParser:
    """Flags left out are absent from the result: their defaults are `Settings`'."""
    parser = argparse.ArgumentParser(
        description="Fine-tune a LLaMA-family model with LoFT, LoRA or in full.",
        argument_default=argparse.SUPPRESS,
    )
    add, defaults = parser.add_argument, Settings()
    add("--method", choices=METHODS, help=f"default {defaults.method}")
    add(
        "--second-moment",
        choices=("calibrated", "factored", "diagonal"),
        help=f"LoFT's; default {defaults.second_moment}",
    )
    add("--model", help="folder of LLaMA-family safetensors, or hub id; default SmolLM2-135M")
    add("--data", help="text file (.gz too), or hub dataset id; default Wikipedia articles")
    add("--eval-data", help="text file to evaluate on; default one tenth of --data")
    add("--rank", type=_positive_int, help=f"default {defaults.rank}")
    add("--alpha", type=_positive_float, help="the adapters' scale is alpha/rank; default rank")
    add("--targets", type=_targets, help=f"of {','.join(TARGETS)}; default q,k,v,up,down")
    add("--quantize", choices=("nf4", "int4", "int8"), help="the frozen weights; default not")
    add("--tile-size", type=_positive_int, help="quantized numbers that share a scale; default 64")
    rates = ", ".join(f"{rate:g} for {method}" for method, rate in LEARNING_RATES.items())
    add("--learning-rate", type=_positive_float, help=f"the peak; default {rates}")
    for name in ("steps", "batch_size", "seq_len", "eval_windows", "eval_every", "save_every"):
        flag = "--" + name.replace("_", "-")
        add(flag, type=_positive_int, help=f"default {getattr(defaults, name)}")
    add("--seed", type=int, help=f"default {defaults.seed}")
    add("--prompt", help=f"to generate from; default {defaults.prompt!r}")
    add("--output", type=Path, help="folder for the results; default the next runs/METHOD-N")
    add("--resume", action="store_true", help="continue the run in --output where it stopped")
    return parser


def _positive_int(value: str) -> int:
    if not value.isdigit() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not a positive whole number")
    return int(value)


def _positive_float(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{value!r} is not a positive number")
    return number


def _targets(value: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(value.split(",")))
    if unknown := [name for name in names if name not in TARGETS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {','.join(TARGETS)}")
    return names
