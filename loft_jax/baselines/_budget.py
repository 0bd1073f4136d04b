"""AdaLoRA's budget: how many triplets to keep at a step, and which."""

import bisect
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


def budget_schedule(
    initial: int, target: int, total_step: int, t_init: int = 0, t_final: int = 0
) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    r"""Returns AdaLoRA's budget, the number of triplets to keep, as a schedule of the step.

    The budget is ``initial`` up to step ``t_init``, ``target`` from step ``total_step - t_final``,
    and in between, rounded down,

    .. math:: b_T + (b_0 - b_T) \left(1 - \frac{t - t_i}{T - t_i - t_f}\right)^3

    Args:
      initial: the total rank at the start.
      target: the total rank at the end, at most ``initial``.
      total_step, t_init, t_final: as in `adalora`.

    Returns:
      A function from the step, which may be traced, to an int32. It compares integers, so it is
      exact in any floating-point precision.

    Raises:
      ValueError: a target outside 0 to ``initial``, or zero steps between the two phases.

    Source: Zhang et al., ICLR 2023, eq. (12), with the numerator :math:`t - t_i` of the released
      code. The printed :math:`t - t_i - t_f` would start above the initial budget and end above the
      final one.

    Example:
      >>> budget = budget_schedule(16, 8, total_step=8, t_init=2, t_final=2)
      >>> [int(budget(step)) for step in range(8)]
      [16, 16, 16, 11, 9, 8, 8, 8]
    """
    steps, spare = total_step - t_init - t_final, initial - target
    if steps < 1 or not 0 <= target <= initial:
        raise ValueError(
            f"budget_schedule: {steps} steps from {initial} ranks to {target}: it takes one step "
            "at least, and 0 <= target <= initial"
        )
    # For each k, the first step at which fewer than k of the spare ranks are left.
    left = lambda step: spare * (steps - step) ** 3
    gone = [
        bisect.bisect_left(range(steps + 1), True, key=lambda step, k=k: left(step) < k * steps**3)
        for k in range(1, spare + 1)
    ]
    ends = jnp.asarray(gone, jnp.int32) + t_init
    return lambda step: target + jnp.sum(step < ends, dtype=jnp.int32)


def keep_highest(scores: Sequence[jax.Array], budget: jax.Array) -> list[jax.Array]:
    """Returns masks, in the shapes of ``scores``, of the ``budget`` highest scores of all.

    The number kept is exactly ``budget``; of equal scores, the first are kept.
    """
    flat = jnp.concatenate([score.ravel() for score in scores])
    place = jnp.argsort(jnp.argsort(-flat))  # position of each score in descending order
    ends = [0]
    for score in scores:
        ends.append(ends[-1] + score.size)
    keep = place < budget
    return [keep[i:j].reshape(x.shape) for i, j, x in zip(ends, ends[1:], scores, strict=False)]
