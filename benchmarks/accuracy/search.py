"""The search for a learning rate: a function from the known losses to the next rate.

Rates are on the grid ..., 1e-4, 3e-4, 1e-3, 3e-3, ... and have an index: 0 is 1, -1 is 0.3, -2 is
0.1.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple


class Search(NamedTuple):
    """The state of a search."""

    tried: tuple[int, ...]
    """Indices, in the order of the tries."""
    next_index: int | None
    """The index to try next; None if the search has ended."""
    best: int | None
    """The index of the lowest loss so far; None before the first try."""

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the lowest or the highest of those tried."""
        return self.best in (min(self.tried), max(self.tried)) if self.tried else False


def rate_at(index: int) -> float:
    """The learning rate at an index of the grid.

    Example:
      >>> [rate_at(index) for index in (-5, -4, -3, 0)]
      [0.003, 0.01, 0.03, 1.0]
    """
    return float(f"{3 if index % 2 else 1}e{index // 2}")


def index_of(rate: float) -> int:
    """The index of the nearest learning rate by ratio.

    Example:
      >>> index_of(0.003), index_of(0.0014)
      (-5, -6)
    """
    guess = round(2 * math.log10(rate))
    return min((guess - 1, guess, guess + 1), key=lambda p: abs(math.log(rate_at(p) / rate)))


def search(losses: Mapping[int, float], start: int, budget: int) -> Search:
    """Follows the search through the known losses.

    The search tries `start` and its two neighbors, then the neighbors of the best index, then their
    neighbors, on the better side first. It ends when the budget is spent or when two indices on
    each side of the best were tried. Losses that the search does not reach have no influence.

    Args:
        losses: validation losses by index; infinite for runs that diverged.
        start: the first index.
        budget: the largest number of tries.
    """
    tried: list[int] = []
    while len(tried) < budget:
        next_index = _next(tried, losses, start)
        if next_index is None or next_index not in losses:
            return Search(tuple(tried), next_index, _best(tried, losses))
        tried.append(next_index)
    return Search(tuple(tried), None, _best(tried, losses))


def _best(tried: list[int], losses: Mapping[int, float]) -> int | None:
    """The lowest rate among equal losses, so that the search goes down if all runs diverge."""
    return min(tried, key=lambda index: (losses[index], index)) if tried else None


def _next(tried: list[int], losses: Mapping[int, float], start: int) -> int | None:
    for index in (start, start + 1, start - 1):
        if index not in tried:
            return index
    best = _best(tried, losses)
    assert best is not None
    loss = lambda index: losses[index] if index in tried else math.inf
    up = 1 if loss(best + 1) < loss(best - 1) else -1
    around = (best + up, best - up, best + 2 * up, best - 2 * up)
    return next((index for index in around if index not in tried), None)
