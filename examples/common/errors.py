"""Early ends of a run, and the exit status of each."""

import sys
from collections.abc import Callable

from loft_jax.checkpoint import CheckpointError


class UserError(Exception):
    """An error that the user can fix; the message states the problem, the place and the remedy."""


class Preempted(Exception):
    """The run received SIGTERM and saved its state."""


PREEMPTED = 75
"""The exit status after SIGTERM: a scheduler should repeat the command with --resume."""


def exit_status(work: Callable[[], None]) -> int:
    """Calls `work` and prints the error that ends it, if any.

    Returns:
        0, 1 after an error message, 75 if preempted, 130 if interrupted.
    """
    try:
        work()
    except (UserError, CheckpointError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except Preempted:
        return PREEMPTED
    except KeyboardInterrupt:
        return 130
    return 0
