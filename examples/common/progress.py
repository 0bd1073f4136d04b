"""How long the parts of a run take, and how long the rest of it will."""

import contextlib
import dataclasses
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator

RECENT = 100
"""The estimate is made from this many durations of each kind."""


@dataclasses.dataclass
class Measured:
    """A duration, which is known after its `with` block."""

    seconds: float = 0.0


class Clock:
    """Measures steps, evaluations and checkpoints apart, and estimates the time left.

    The first of each kind includes its compilation, so it does not count as soon as there is a
    second.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._first: dict[str, float] = {}
        self._later: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))
        self._total: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def measure(self, kind: str) -> Iterator["Measured"]:
        """Measures the duration of a `with` block."""
        began, measured = self._now(), Measured()
        yield measured
        measured.seconds = seconds = self._now() - began
        self._total[kind] += seconds
        if kind in self._first:
            self._later[kind].append(seconds)
        else:
            self._first[kind] = seconds

    def typical(self, kind: str) -> float:
        """The mean duration of the latest of a kind in seconds; 0 if there was none."""
        later = self._later[kind]
        return sum(later) / len(later) if later else self._first.get(kind, 0.0)

    def total(self, kind: str) -> float:
        """The duration of all of a kind in seconds, without their compilation."""
        return self._total[kind] - self._compilation(kind)

    def compilation(self) -> float:
        """What the first step and evaluation took longer than the later ones, in seconds."""
        return self._compilation("step") + self._compilation("evaluation")

    def left(self, **counts: int) -> float:
        """The estimated seconds until so many of each kind are done."""
        return sum(count * self.typical(kind) for kind, count in counts.items())

    def _compilation(self, kind: str) -> float:
        return max(0.0, self._first[kind] - self.typical(kind)) if kind in self._first else 0.0


def multiples(every: int, done: int, last: int) -> int:
    """How many of the steps after `done` are multiples of `every`, or the last one.

    Example:
        >>> multiples(4, 0, 10)  # 4, 8 and 10
        3
    """
    return last // every - done // every + (last % every != 0 and done < last)


def clock_time(seconds: float) -> str:
    """'1:05', '2:00:00'.

    Example:
        >>> clock_time(65.4), clock_time(7200)
        ('1:05', '2:00:00')
    """
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"
