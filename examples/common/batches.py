"""Selection of examples: batches, evenly spaced subsets, and held-out places.

Examples are an array, or a tree of arrays, with one row per example.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

HELD_OUT_EVERY = 10
"""One example in this many is held out from training."""


def count(examples: Any) -> int:
    """Number of examples."""
    return len(jax.tree.leaves(examples)[0])


def rows(examples: Any, chosen: Any) -> Any:
    """The examples that `chosen`, a slice or an array of integers, selects."""
    return jax.tree.map(lambda array: array[chosen], examples)


def batch_at(examples: Any, batch: int, seed: int, step: int) -> Any:
    """The batch of a step; each epoch has its own order.

    The batch depends only on the seed and the step. A resumed run therefore needs no saved
    position in the data beyond the step.
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
    """At most `most` examples, evenly spaced over all of them."""
    total = count(examples)
    places = np.linspace(0, total - 1, min(most, total))
    return rows(examples, places.round().astype(int))


def held_out_places(total: int) -> range:
    """The places of the held-out examples: every tenth, and at least one.

    Evenly spaced places are fairer than the last tenth, because collections are often sorted: the
    Wikipedia articles end with stubs, which are easier to predict than the rest.
    """
    return range(min(HELD_OUT_EVERY, total) - 1, total, HELD_OUT_EVERY)
