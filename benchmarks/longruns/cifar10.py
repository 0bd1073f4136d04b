"""The vision task with CIFAR-10 in place of Fashion-MNIST."""

import argparse

from benchmarks.longruns import images
from benchmarks.longruns.tasks import Problem
from benchmarks.longruns.vision import CACHE as CACHE
from benchmarks.longruns.vision import PRETRAINING_STEPS as PRETRAINING_STEPS
from benchmarks.longruns.vision import UNIT as UNIT
from benchmarks.longruns.vision import Sizes, image_problem
from examples.common.errors import UserError


def problem(options: argparse.Namespace, sizes: Sizes) -> Problem:
    if options.images is None:
        raise UserError("cifar10 needs --images, a folder with cifar10-train.npz and -test.npz.")
    return image_problem(images.cifar10(options.images), sizes)
