"""Settings and command line of `finetune_llm.py` and `multi_device.py`."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from .errors import UserError
from .methods import METHODS
from .models.llama import TARGETS
from .settings import Settings, add_number, check_decay, make_parser, names, parse, positive_int

_SECOND_MOMENTS = {"calibrated": "loft", "factored": "factored", "diagonal": "simple"}


@dataclasses.dataclass(frozen=True)
class LlmSettings(Settings):
    """The settings of a run; they are saved in its folder and never change."""

    task: Literal["text", "instructions", "multiple-choice"] | None = None
    train_on: Literal["answers", "all"] = "answers"
    packing: bool = True
    chat_template: str | None = None
    compare: tuple[str, ...] = ()
    generate: int = 0
    max_new_tokens: int = 128
    answers: Literal["labels", "words"] = "labels"
    second_moment: Literal["calibrated", "factored", "diagonal"] = "calibrated"
    targets: tuple[str, ...] = ("q", "k", "v", "up", "down")
    quantize: Literal["nf4", "int4", "int8"] | None = None
    tile_size: int = 64
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    seq_len: int = 128
    eval_windows: int = 48
    eval_questions: int = 32
    prompt: str = "The history of the city"

    @property
    def optimizer(self) -> str:
        """The method whose optimizer is used."""
        return _SECOND_MOMENTS[self.second_moment] if self.method == "loft" else self.method


def parse_arguments(argv: Sequence[str] | None) -> tuple[LlmSettings, Path | None, bool]:
    """The settings, the output folder if one is given, and whether to resume the run in it."""
    defaults = LlmSettings()
    methods = [name for name, method in METHODS.items() if method.for_text]
    parser = make_parser(
        "Fine-tune a language model with LoFT or a baseline.", defaults, TARGETS, methods
    )
    add = parser.add_argument
    add(
        "--second-moment",
        choices=_SECOND_MOMENTS,
        help=f"second moment of --method loft; default {defaults.second_moment}",
    )
    add(
        "--model",
        help="folder with config.json, tokenizer.json and safetensors, or hub id; default "
        "SmolLM2-135M",
    )
    add(
        "--task",
        choices=("text", "instructions", "multiple-choice"),
        help="default from the fields of --data",
    )
    add(
        "--train-on",
        choices=("answers", "all"),
        help=f"tokens of --task instructions to train on; default {defaults.train_on}",
    )
    add(
        "--packing",
        action=argparse.BooleanOptionalAction,
        help="several examples in a row, with segment masks; --no-packing pads each; default on",
    )
    add(
        "--compare",
        type=names,
        help="methods to train too, at the same learning rate, separated by commas",
    )
    add("--chat-template", help="Jinja file of the chat template; default the model's own")
    add(
        "--generate",
        type=positive_int,
        help="held-out prompts to answer before and after training, and prompts of each "
        "--test-data; default none, and all",
    )
    add(
        "--test-data",
        type=names,
        help="files or hub datasets, separated by commas, whose questions to answer before "
        "and after training",
    )
    add_number(parser, defaults, "max_new_tokens", "tokens of a generated answer")
    add(
        "--answers",
        choices=("labels", "words"),
        help=f"how to answer multiple-choice questions; default {defaults.answers}",
    )
    add(
        "--data",
        help="file of text, JSON, JSON Lines or Parquet (.gz too), or hub dataset as "
        "owner/name:configuration:split; default Wikipedia articles",
    )
    add("--eval-data", help="held-out data in the same format; default one tenth of --data")
    add(
        "--quantize",
        choices=("nf4", "int4", "int8"),
        help="quantize the frozen weights; default no quantization",
    )
    add("--tile-size", type=positive_int, help="quantized weights per scale; default 64")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the frozen weights and the activations; adapters and their optimizer's state are "
        f"float32; default {defaults.dtype}",
    )
    add(
        "--remat",
        action=argparse.BooleanOptionalAction,
        help="recompute each layer in the backward pass: less memory, about a third more time",
    )
    add_number(parser, defaults, "seq_len", "tokens per example")
    add_number(parser, defaults, "eval_windows", "windows of text to evaluate on")
    add_number(parser, defaults, "eval_questions", "questions or instructions to evaluate on")
    sample = "prompt of the generated samples, '' for none"
    add("--prompt", help=f"{sample}; default {defaults.prompt!r}")
    settings, output, resume = parse(parser, LlmSettings, argv)
    if unknown := [name for name in settings.compare if name not in methods]:
        raise UserError(f"--compare {unknown[0]}: choose from {', '.join(methods)}.")
    for method in (settings.method, *settings.compare):
        _check_storage(settings, method)
        check_decay(settings, method)
    if settings.merge and settings.quantize is not None:
        raise UserError(
            "--merge needs unquantized weights, because an adapter is smaller than the steps of "
            f"--quantize {settings.quantize}: remove one of the two."
        )
    return settings, output, resume


def _check_storage(settings: LlmSettings, method: str) -> None:
    """Raises an error if a method cannot train with the weights in this format."""
    if settings.quantize is not None and METHODS[method].trains == "all":
        raise UserError(
            f"--quantize needs frozen weights, but --method {method} trains all weights."
        )
    if settings.dtype != "float32" and METHODS[method].trains != "adapters":
        raise UserError(
            f"--dtype {settings.dtype} is for frozen weights, but --method {method} "
            "trains weights, and their updates would be rounded away: remove the flag."
        )
    if settings.quantize is not None and METHODS[method].dora:
        raise UserError("--quantize does not support --method dora, which needs unquantized norms.")
