"""What `finetune_vit.py` can be asked to do: its settings and its command line."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import settings
from settings import add_number, make_parser, positive_float
from vit import TARGETS


@dataclasses.dataclass(frozen=True)
class VitSettings(settings.Settings):
    """What a run computes; kept in its folder, and fixed for its lifetime."""

    # Best of those tried in 40 steps on the digits, one seed, held-out accuracy of 300: full 3e-5
    # (0.89; 1e-5 0.85, 1e-4 0.25), LoRA 5e-4 (0.89; 1.5e-3 0.89), LoFT 5e-5 (0.87; 1.5e-4 0.82, and
    # with the head at 1e-3 3e-5 0.86, 1e-4 0.83). LoFT's relatives have its rate, untried.
    full_rate: ClassVar[float] = 3e-5
    rates: ClassVar[Mapping[str, float]] = {
        "loft": 6e-5,
        "factored": 6e-5,
        "simple": 6e-4,
        "muon": 6e-5,
        "head": 3e-3,
    }
    targets: tuple[str, ...] = tuple(TARGETS)
    batch_size: int = 32
    image_size: int = 56
    eval_images: int = 500
    head_learning_rate: float = 3e-3

    @property
    def peak(self) -> float:
        """The learning rate at its highest; the head's where the head alone is trained."""
        if self.method == "head":
            return self.learning_rate or self.head_learning_rate
        return super().peak

    @property
    def head_ratio(self) -> float:
        """The head's learning rate as a multiple of the method's."""
        return self.head_learning_rate / self.peak


def parse_arguments(argv: Sequence[str] | None) -> tuple[VitSettings, Path | None, bool]:
    """The settings, the output folder if one is named, and whether to resume the run in it."""
    defaults = VitSettings()
    parser = make_parser(
        "Fine-tune a Vision Transformer with LoFT, LoRA, their peers or in full.", defaults, TARGETS
    )
    add = parser.add_argument
    add(
        "--model", help="folder of a ViT's or a DINOv2's safetensors, or hub id; default a ViT-S/14"
    )
    add("--data", help=".npz file, or folder with a folder for each class; default MNIST digits")
    add("--eval-data", help="the same, to evaluate on; default one tenth of --data")
    add_number(parser, defaults, "image_size", "pixels along an edge, a multiple of the patches'")
    add_number(parser, defaults, "eval_images")
    rate = defaults.head_learning_rate
    add("--head-learning-rate", type=positive_float, help=f"the new head's peak; default {rate:g}")
    return settings.parse(parser, VitSettings, argv)
