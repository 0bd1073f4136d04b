"""Batches of examples: which rows a step sees.

Examples are an array, or a tree of arrays, of as many rows as there are examples.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np


def count(examples: Any) -> int:
    """How many examples there are."""
    return len(jax.tree.leaves(examples)[0])


def rows(examples: Any, chosen: Any) -> Any:
    """The examples at those places; a slice or whole numbers."""
    return jax.tree.map(lambda array: array[chosen], examples)


def batch_at(examples: Any, batch: int, seed: int, step: int) -> Any:
    """The batch of a step, shuffled anew in every epoch.

    A function of the seed and the step alone, which is what makes a resumed run exact: the
    position in the data is the step.
    """
    positions = step * batch + np.arange(batch)
    epochs, places = np.divmod(positions, count(examples))
    orders = {
        epoch: np.random.default_rng([seed, epoch]).permutation(count(examples))
        for epoch in np.unique(epochs)
    }
    chosen = [orders[epoch][place] for epoch, place in zip(epochs, places, strict=True)]
    return rows(examples, np.array(chosen))


def batches(examples: Any, batch: int, seed: int, steps: range) -> Iterator[Any]:
    """`batch_at` for each of `steps`."""
    return (batch_at(examples, batch, seed, step) for step in steps)


def spread(examples: Any, most: int) -> Any:
    """At most so many examples, evenly spaced over all of them."""
    total = count(examples)
    places = np.linspace(0, total - 1, min(most, total))
    return rows(examples, places.round().astype(int))
