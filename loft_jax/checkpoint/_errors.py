"""Errors and warnings of checkpoints. Each message names the folder or the path, and a remedy."""

from collections.abc import Sequence


class CheckpointError(Exception):
    """A checkpoint could not be written or read: disk full, no permission, a dead process."""


class CheckpointMismatch(CheckpointError):
    """An intact checkpoint of another setup: rank, layers, optimizer, options, layout or base."""


class CheckpointDamaged(CheckpointError):
    """No checkpoint in the folder is intact. The message lists the damage of each."""


class DamagedCheckpointWarning(UserWarning):
    """A damaged checkpoint was skipped. `Checkpoints.restore` tries the next older one."""


class UndeletedCheckpointWarning(UserWarning):
    """A checkpoint that is not kept anymore could not be deleted. It takes up space."""


def brief(error: BaseException) -> str:
    """Returns the message of an error without the pages of settings that TensorStore appends."""
    return str(error).partition(" [tensorstore_spec")[0][:500] or type(error).__name__


def listing(headline: str, lines: Sequence[str], most: int = 12) -> str:
    """Returns a headline followed by the first few lines."""
    shown = [f"  {line}" for line in lines[:most]]
    if len(lines) > most:
        shown.append(f"  and {len(lines) - most} more")
    return "\n".join([headline, *shown])
