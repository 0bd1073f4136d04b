"""What ends a run before its time, and what the user and a scheduler are told of it."""

import sys
from collections.abc import Callable

from loft_jax.checkpoint import CheckpointError


class UserError(Exception):
    """Something the user can mend: the message says what is wrong, where, and the remedy."""


class Preempted(Exception):
    """SIGTERM has come, and the state is saved."""


PREEMPTED = 75
"""The exit status that tells a scheduler to run the same command again, with --resume."""


def exit_status(work: Callable[[], None]) -> int:
    """Does the work, and says what has stopped it.

    Returns:
        0, 1 after a message to the user, 75 if preempted, 130 if interrupted.
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
