"""The search for a learning rate: which one to try next, as a function of what was found.

Rates lie on the grid ..., 1e-4, 3e-4, 1e-3, 3e-3, ... and go by their place on it: 0 is 1, -1 is
0.3, -2 is 0.1.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple


class Search(NamedTuple):
    """How far a search has come."""

    tried: tuple[int, ...]
    """Places, in the order in which they were tried."""
    wanted: int | None
    """The place to try next; None at the end of the search."""
    best: int | None
    """The place of the lowest loss so far; None before the first."""

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the lowest or the highest that was tried."""
        return self.best in (min(self.tried), max(self.tried)) if self.tried else False


def rate_at(place: int) -> float:
    """The learning rate at a place of the grid.

    Example:
      >>> [rate_at(place) for place in (-5, -4, -3, 0)]
      [0.003, 0.01, 0.03, 1.0]
    """
    return float(f"{3 if place % 2 else 1}e{place // 2}")


def place_of(rate: float) -> int:
    """The place that is nearest to a learning rate, by ratio.

    Example:
      >>> place_of(0.003), place_of(0.0014)
      (-5, -6)
    """
    guess = round(2 * math.log10(rate))
    return min((guess - 1, guess, guess + 1), key=lambda p: abs(math.log(rate_at(p) / rate)))


def search(losses: Mapping[int, float], start: int, budget: int) -> Search:
    """Follows the search through the losses that are known.

    First `start` and both its neighbours; then on around the best, its neighbours before theirs and
    towards the better side before the other, until the budget is spent or two on each side of the
    best were tried. Losses that the search does not come to have no influence.

    Args:
        losses: validation losses by place; infinite where a run has diverged.
        start: the place to begin at.
        budget: how many rates to try at most.
    """
    tried: list[int] = []
    while len(tried) < budget:
        wanted = _next(tried, losses, start)
        if wanted is None or wanted not in losses:
            return Search(tuple(tried), wanted, _best(tried, losses))
        tried.append(wanted)
    return Search(tuple(tried), None, _best(tried, losses))


def _best(tried: list[int], losses: Mapping[int, float]) -> int | None:
    """Of equal losses, the lowest rate: where all runs diverge, the search goes down."""
    return min(tried, key=lambda place: (losses[place], place)) if tried else None


def _next(tried: list[int], losses: Mapping[int, float], start: int) -> int | None:
    for place in (start, start + 1, start - 1):
        if place not in tried:
            return place
    best = _best(tried, losses)
    assert best is not None
    loss = lambda place: losses[place] if place in tried else math.inf
    up = 1 if loss(best + 1) < loss(best - 1) else -1
    around = (best + up, best - up, best + 2 * up, best - 2 * up)
    return next((place for place in around if place not in tried), None)
