"""Which checkpoint a run resumes from: the newest that is intact."""

from collections.abc import Callable, Sequence
from pathlib import Path

from loft_jax.checkpoint import _folder, _processes
from loft_jax.checkpoint._errors import CheckpointDamaged, CheckpointError, listing
from loft_jax.checkpoint._reading import Restored, Vanished
from loft_jax.checkpoint._record import Damaged

# How many times to list the folder anew when all listed checkpoints were deleted meanwhile.
_ATTEMPTS = 5


def restore_newest(
    folder: Path,
    step: int | None,
    list_steps: Callable[[], Sequence[int]],
    read: Callable[[int], Restored],
    on_damage: Callable[[int, str], None],
    read_only: bool,
) -> Restored | None:
    """Reads the newest intact checkpoint.

    Args:
      folder: the folder of the run.
      step: the only step to read; None tries all.
      list_steps: returns the saved steps in order.
      read: reads a step, or raises `Damaged` or `Vanished`.
      on_damage: called with a damaged step and the reason.
      read_only: whether another run may delete checkpoints meanwhile.

    Returns:
      What `read` returned; None if the folder has no checkpoint, not even a damaged one.

    Raises:
      CheckpointDamaged: no checkpoint is intact, or ``step`` is not.
      CheckpointError: ``step`` does not exist, or its run deletes checkpoints too fast.
    """
    reasons: dict[int, str] = {}
    for _ in range(_ATTEMPTS):
        steps, vanished = list_steps(), False
        if step is not None and step not in steps:
            found = f"{list(steps) or 'none'}"
            raise CheckpointError(f"{folder} has no step {step}. Saved steps: {found}.")
        for candidate in reversed(steps) if step is None else [step]:
            try:
                return read(candidate)
            except Vanished:
                vanished = True  # deleted by its run, which saved a newer one
            except Damaged as damage:
                if read_only and _has_changed(candidate, steps, list_steps()):
                    vanished = True  # read while it was being deleted
                    continue
                on_damage(candidate, str(damage))
                reasons[candidate] = str(damage)
        if not vanished:
            break
    else:
        raise CheckpointError(
            f"{folder}: its run deletes checkpoints faster than they are read. Try again, or "
            "increase keep."
        )
    aside = _processes.on_first_process(lambda: _folder.set_aside(folder))
    if not reasons and not aside:
        return None
    lines = [f"step {step}: {reason}" for step, reason in reasons.items()]
    headline = (
        "no checkpoint is intact. Restore the folder from a backup, or start in another one."
        if step is None
        else f"step {step} is damaged. Omit step= to restore the newest intact one."
    )
    raise CheckpointDamaged(
        listing(
            f"{folder}: {headline}",
            lines or [f"damaged/{name}: moved there earlier" for name in aside],
        )
    )


def _has_changed(step: int, before: Sequence[int], now: Sequence[int]) -> bool:
    """Whether the run deleted this step, or saved a newer one, since the steps were listed."""
    return step not in now or max(now) > max(before)
