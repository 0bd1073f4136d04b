"""The learning rate of each step: a linear warm-up, then a constant, a line, or half a cosine."""

import math
from typing import Literal

Schedule = Literal["linear", "cosine", "constant"]
"""How the learning rate falls after the warm-up; "linear" and "cosine" fall to zero."""


def learning_rate_at(
    step: int,
    steps: int,
    peak: float,
    warmup: float = 0.1,
    schedule: Schedule = "linear",
) -> float:
    """The learning rate of a step, which is positive in all of them.

    Args:
        step: from 0.
        steps: of the run.
        peak: the learning rate after the warm-up.
        warmup: the number of steps in which the learning rate rises linearly from zero. Below 1,
            it is a fraction of the steps.
        schedule: what follows the warm-up.

    Example:
        >>> [learning_rate_at(step, 4, 1.0, warmup=2) for step in range(4)]
        [0.5, 1.0, 1.0, 0.5]
        >>> [round(learning_rate_at(step, 3, 1.0, 0, "cosine"), 2) for step in range(3)]
        [1.0, 0.75, 0.25]
    """
    rising = max(1, round(warmup * steps if warmup < 1 else warmup)) if warmup else 0
    if step < rising:
        return peak * (step + 1) / rising
    falling = steps - rising
    if schedule == "linear":
        return peak * (steps - step) / falling
    if schedule == "cosine":
        return peak * (1 + math.cos(math.pi * (step - rising) / falling)) / 2
    return peak
