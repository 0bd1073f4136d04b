"""The vision task: a small Vision Transformer goes from digits to Fashion-MNIST.

It is first trained on 5,000 handwritten digits of MNIST. Its head and its embedding of patches stay
as they are: each digit then stands for a kind of clothes.
"""

import argparse
import functools
from typing import NamedTuple

from benchmarks.longruns import images
from benchmarks.longruns import vision_model as model
from benchmarks.longruns.tasks import Problem

UNIT = "nats an image"
PRETRAINING_STEPS = 1000
CACHE = "longruns-digits.npz"
HELD_OUT_BATCHES = 128


class Sizes(NamedTuple):
    """The size of the model and of a run."""

    steps: int = 1500
    layers: int = 2
    width: int = 64
    patch: int = 8
    batch: int = 32


def problem(options: argparse.Namespace, sizes: Sizes) -> Problem:
    return image_problem(images.fashion_mnist(options.images or images.FASHION_MNIST), sizes)


def image_problem(sets: images.ImageSets, sizes: Sizes) -> Problem:
    """Returns the problem of going from digits to other images."""
    draw = lambda data: lambda rng, count: images.draw(data, rng, count, sizes.batch)
    held_out = lambda data: images.held_out(data, HELD_OUT_BATCHES, sizes.batch)
    return Problem(
        init=functools.partial(
            model.init, layers=sizes.layers, width=sizes.width, patch=sizes.patch
        ),
        loss=model.loss,
        accuracy=model.accuracy,
        pretraining=lambda: draw(images.digits()),
        batches=draw(sets.train),
        validation=held_out(sets.validation),
        test=held_out(sets.test),
    )
