"""The language task: a byte-level transformer goes from prose to Python.

It is first trained on the bytes of a text, then fine-tuned on the sources of Python's standard
library. Files are held out for the validation and the test loss.
"""

import argparse
import functools
from typing import NamedTuple

from benchmarks.longruns import language_model as model
from benchmarks.longruns.tasks import Problem
from benchmarks.longruns.texts import held_out, python_sources, read_text, windows

UNIT = "nats a byte"
PRETRAINING_STEPS = 4000
CACHE = "longruns-pretrained.npz"


class Sizes(NamedTuple):
    """The size of the model and of a run."""

    steps: int = 1500
    layers: int = 2
    width: int = 128
    length: int = 64
    batch: int = 8


def problem(options: argparse.Namespace, sizes: Sizes) -> Problem:
    texts, shape = python_sources(), (sizes.batch, sizes.length)
    draw = lambda text: lambda rng, count: windows(text, rng, count, *shape)
    return Problem(
        init=functools.partial(
            model.init, layers=sizes.layers, width=sizes.width, length=sizes.length
        ),
        loss=model.loss,
        accuracy=None,
        pretraining=lambda: draw(read_text(options)),
        batches=draw(texts.train),
        validation=held_out(texts.validation, *shape),
        test=held_out(texts.test, *shape),
    )
