"""The time left of a run, by a clock that the test sets."""

import pytest

from common.progress import Clock, clock_time, multiples


class Time:
    """A clock that stands still until it is moved."""

    seconds = 0.0

    def __call__(self):
        return self.seconds


def test_compilation_and_evaluations_do_not_distort_the_time_left():
    time = Time()
    clock = Clock(time)

    def take(kind, seconds):
        with clock.measure(kind) as measured:
            time.seconds += seconds
        assert measured.seconds == pytest.approx(seconds)

    assert clock.left(step=10, evaluation=2) == 0  # nothing is known yet
    take("evaluation", 30.0)  # it compiles
    take("step", 60.0)  # so does this
    assert clock.left(step=9, evaluation=2) == 9 * 60 + 2 * 30  # the best guess so far
    for _ in range(4):
        take("step", 2.0)
    assert clock.left(step=5, evaluation=2) == 5 * 2 + 2 * 30
    take("evaluation", 10.0)
    assert clock.left(step=5, evaluation=1) == 5 * 2 + 10
    assert clock.left(step=5, evaluation=1, checkpoint=3) == 5 * 2 + 10
    assert clock.compilation() == (60 - 2) + (30 - 10)
    assert (clock.total("step"), clock.total("evaluation")) == (5 * 2, 2 * 10)
    # The estimate follows a machine that becomes slower.
    for _ in range(200):
        take("step", 4.0)
    assert clock.typical("step") == 4.0


@pytest.mark.parametrize("every", [1, 3, 4, 10, 20])
@pytest.mark.parametrize("last", [1, 9, 10, 12])
def test_the_evaluations_left_are_counted(every, last):
    for done in range(last + 1):
        left = [step for step in range(done + 1, last + 1) if step % every == 0 or step == last]
        assert multiples(every, done, last) == len(left)


def test_durations_are_written_as_on_a_clock():
    assert [clock_time(x) for x in (0, 59.4, 59.6, 3599.6, 36_000)] == [
        "0:00",
        "0:59",
        "1:00",
        "1:00:00",
        "10:00:00",
    ]
