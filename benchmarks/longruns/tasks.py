"""What a task of the long runs consists of, and the tasks by name."""

import argparse
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

import jax
import numpy as np

Batches = Any
"""A pytree of arrays whose first axis counts batches."""

Sizes = Any
"""A NamedTuple of integers: `steps` of fine-tuning, `layers`, `width`, `batch` and others."""


class Problem(NamedTuple):
    """A model, its loss and its data.

    Attributes:
      init: `key -> parameters`; adapters are on the kernels of `parameters["layers"]`.
      loss: `(parameters, adapters, batch, scale) ->` the mean loss of a batch, in nats.
      accuracy: the same for the fraction of right answers; None where there are none.
      pretraining: returns `(generator, count) -> batches` to train on first; it reads the data.
      batches: `(generator, count) -> batches` of fine-tuning.
      validation, test: batches that are the same in all runs.
    """

    init: Callable[[jax.Array], Any]
    loss: Callable[..., jax.Array]
    accuracy: Callable[..., jax.Array] | None
    pretraining: Callable[[], Callable[[np.random.Generator, int], Batches]]
    batches: Callable[[np.random.Generator, int], Batches]
    validation: Batches
    test: Batches


class Task(Protocol):
    """A module of a task.

    Attributes:
      Sizes: the NamedTuple, with its defaults.
      UNIT: of the loss.
      PRETRAINING_STEPS: the default.
      CACHE: the default file of the pretrained model.
    """

    Sizes: Any
    UNIT: str
    PRETRAINING_STEPS: int
    CACHE: str

    def problem(self, options: argparse.Namespace, sizes: Any) -> Problem:
        """Reads the data that the options name."""
        ...


TASKS = ("language", "arithmetic", "vision", "cifar10")
"""The modules of the tasks."""


def task(name: str) -> Task:
    """Returns the module of a task."""
    return cast(Task, importlib.import_module(f"benchmarks.longruns.{name}"))
