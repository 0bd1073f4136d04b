"""What may go wrong with a checkpoint. Each message names the folder or the path, and a remedy."""

from collections.abc import Sequence


class CheckpointError(Exception):
    """A checkpoint could not be written or read: no room, no permission, a process that is gone."""


class CheckpointMismatch(CheckpointError):
    """A whole checkpoint of another setup: another rank, layers, optimizer or base."""


class CheckpointDamaged(CheckpointError):
    """No checkpoint of the folder is whole; the message lists what is wrong with each."""


class DamagedCheckpointWarning(UserWarning):
    """A damaged checkpoint was passed over, and an older one is tried."""


def brief(error: BaseException) -> str:
    """What an error says, without the pages of settings with which TensorStore ends its own."""
    return str(error).partition(" [tensorstore_spec")[0][:500] or type(error).__name__


def listing(headline: str, lines: Sequence[str], most: int = 12) -> str:
    """A headline and the first few lines under it."""
    shown = [f"  {line}" for line in lines[:most]]
    if len(lines) > most:
        shown.append(f"  and {len(lines) - most} more")
    return "\n".join([headline, *shown])
