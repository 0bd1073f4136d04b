"""What `finetune_llm.py` can be asked to do: its settings and its command line."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import settings
from errors import UserError
from llama import TARGETS
from methods import METHODS
from settings import add_number, make_parser, positive_int

_SECOND_MOMENTS = {"calibrated": "loft", "factored": "factored", "diagonal": "simple"}


@dataclasses.dataclass(frozen=True)
class LlmSettings(settings.Settings):
    """What a run computes; kept in its folder, and fixed for its lifetime."""

    task: Literal["text", "multiple-choice"] | None = None
    answers: Literal["labels", "words"] = "labels"
    second_moment: Literal["calibrated", "factored", "diagonal"] = "calibrated"
    targets: tuple[str, ...] = ("q", "k", "v", "up", "down")
    quantize: Literal["nf4", "int4", "int8"] | None = None
    tile_size: int = 64
    seq_len: int = 128
    eval_windows: int = 48
    eval_questions: int = 32
    prompt: str = "The history of the city"

    @property
    def optimizer(self) -> str:
        """The method by which the weights are moved."""
        return _SECOND_MOMENTS[self.second_moment] if self.method == "loft" else self.method


def parse_arguments(argv: Sequence[str] | None) -> tuple[LlmSettings, Path | None, bool]:
    """The settings, the output folder if one is named, and whether to resume the run in it."""
    defaults = LlmSettings()
    parser = make_parser(
        "Fine-tune a LLaMA-family model with LoFT, LoRA, their peers or in full.", defaults, TARGETS
    )
    add = parser.add_argument
    add(
        "--second-moment",
        choices=_SECOND_MOMENTS,
        help=f"of --method loft; default {defaults.second_moment}",
    )
    add("--model", help="folder of LLaMA-family safetensors, or hub id; default SmolLM2-135M")
    add(
        "--task",
        choices=("text", "multiple-choice"),
        help="default multiple-choice where --data is a .json file, else text",
    )
    add(
        "--answers",
        choices=("labels", "words"),
        help=f"of multiple choice: their labels, or what they say; default {defaults.answers}",
    )
    add(
        "--data",
        help="text file (.gz too), hub dataset id, or .json file of questions; default Wikipedia "
        "articles",
    )
    add("--eval-data", help="the same, to evaluate on; default one tenth of --data")
    add("--quantize", choices=("nf4", "int4", "int8"), help="the frozen weights; default not")
    add("--tile-size", type=positive_int, help="quantized numbers that share a scale; default 64")
    add_number(parser, defaults, "seq_len", "tokens of a window")
    add_number(parser, defaults, "eval_windows", "of text")
    add_number(parser, defaults, "eval_questions", "of multiple choice")
    add("--prompt", help=f"to generate from; default {defaults.prompt!r}")
    chosen, output, resume = settings.parse(parser, LlmSettings, argv)
    if chosen.quantize is not None and METHODS[chosen.method].trains == "all":
        raise UserError("--quantize is for frozen weights: --method full trains all of them.")
    if chosen.quantize is not None and METHODS[chosen.method].dora:
        raise UserError("--quantize and --method dora do not go together: its norms need weights.")
    return chosen, output, resume
