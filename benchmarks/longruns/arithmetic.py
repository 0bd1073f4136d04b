"""The arithmetic task: the byte-level transformer of the language task goes from prose to sums.

A line is a sum of two numbers, `037+485=0522`. A tenth of all pairs of numbers is held out for the
validation loss, and another for the test loss. The accuracy counts a sum as right where each of its
digits is the most likely one after the right digits before it: then greedy decoding writes it.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.longruns import language_model as model
from benchmarks.longruns.language import CACHE as CACHE
from benchmarks.longruns.language import PRETRAINING_STEPS as PRETRAINING_STEPS
from benchmarks.longruns.language import UNIT as UNIT
from benchmarks.longruns.language import Sizes
from benchmarks.longruns.tasks import Problem
from benchmarks.longruns.texts import HELD_OUT_BATCHES, read_text, windows

NUMBERS = 1000
LINE, ANSWER = 13, slice(8, 12)
"""The bytes of a line, and the places of the answer's digits."""
TRAIN, VALIDATION, TEST = tuple(range(8)), (8,), (9,)
"""Each pair of numbers belongs to one of ten classes, at random."""


def problem(options: argparse.Namespace, sizes: Sizes) -> Problem:
    shape = (sizes.batch, sizes.length)
    train, *held_out = (pairs(classes) for classes in (TRAIN, VALIDATION, TEST))
    validation, test = (
        sums(found, np.random.default_rng(0), HELD_OUT_BATCHES, *shape) for found in held_out
    )

    def pretraining() -> Callable[[np.random.Generator, int], jax.Array]:
        text = read_text(options)
        return lambda rng, count: windows(text, rng, count, *shape)

    return Problem(
        init=functools.partial(
            model.init, layers=sizes.layers, width=sizes.width, length=sizes.length
        ),
        loss=model.loss,
        accuracy=accuracy,
        pretraining=pretraining,
        batches=lambda rng, count: sums(train, rng, count, *shape),
        validation=validation,
        test=test,
    )


def pairs(classes: tuple[int, ...]) -> np.ndarray:
    """Returns the pairs of numbers of some classes: 1000 times the first plus the second."""
    of_pairs = np.random.default_rng(0).integers(0, 10, NUMBERS**2, np.uint8)
    return np.flatnonzero(np.isin(of_pairs, classes))


def sums(
    of: np.ndarray, rng: np.random.Generator, count: int, batch: int, length: int
) -> jax.Array:
    """Returns `count` batches of lines, `(count, batch, length + 1)`, each from a line's start."""
    lines = -(-(length + 1) // LINE)
    left, right = np.divmod(of[rng.integers(0, len(of), (count, batch, lines))], NUMBERS)
    text = np.stack(
        [
            *_digits(left, 3), np.full_like(left, ord("+")), *_digits(right, 3),
            np.full_like(left, ord("=")), *_digits(left + right, 4), np.full_like(left, ord("\n")),
        ],
        axis=-1,
    )  # fmt: skip
    return jnp.asarray(text.reshape(count, batch, -1)[..., : length + 1].astype(np.uint8))


def accuracy(params: Any, adapters: Any, batch: jax.Array, scale: float = 1.0) -> jax.Array:
    """The fraction of the sums of `batch` that are right, where the lines are whole."""
    n, length = batch.shape[0], batch.shape[1] - 1
    found = model.logits(params, adapters, batch, scale).argmax(axis=-1).reshape(n, length)
    right = found == batch[:, 1:]
    # Bytes are predicted from the second on.
    lines = jnp.pad(right, ((0, 0), (1, 0)))[:, : (length + 1) // LINE * LINE]
    return jnp.mean(lines.reshape(n, -1, LINE)[..., ANSWER].all(axis=-1))


def _digits(numbers: np.ndarray, count: int) -> list[np.ndarray]:
    """Returns the characters of the decimal digits, the highest first."""
    return [numbers // 10**k % 10 + ord("0") for k in reversed(range(count))]
