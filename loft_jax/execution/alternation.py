"""Block 1, alternating updates: which factor is active.

The other factor becomes active after every step that had a gradient for an adapter. A step without
one (all zero, or not finite) leaves the active factor as it is. So where a model starts with a zero
head above the adapters, whose gradient at step 1 is zero, the first factor moves at step 2. A
strict alternation would spend step 2 on the factor whose partner is still zero.

Which factor is active never touches the moments, and at full rank either factor realizes the full
step, so the rule keeps every exactness of the method. Bias corrections count all steps, as AdamW's.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from loft_jax.execution.groups import Group
from loft_jax.pairs.find import PairedTree

FactorName = Literal["a", "b"]
# By default b moves first, and a state of zeros is a fresh one.
B_IS_ACTIVE, A_IS_ACTIVE = 0, 1


def first_active(moves_first: FactorName) -> jax.Array:
    """Returns the first value of a state's ``active``, ``()`` int32.

    Raises:
      ValueError: the name is not "a" or "b".
    """
    check_factor_name(moves_first)
    return jnp.asarray(A_IS_ACTIVE if moves_first == "a" else B_IS_ACTIVE, jnp.int32)


def check_factor_name(value: str, argument: str = "moves_first") -> None:
    """Raises ValueError unless the value names a factor."""
    if value not in ("a", "b"):
        raise ValueError(f"{argument} must be 'a' or 'b', got {value!r}")


def next_active(
    active: jax.Array, tree: PairedTree, groups: Sequence[Group], gradients: Sequence[Any]
) -> jax.Array:
    """Returns the active factor of the next step: the other one, if any factor has a gradient.

    It stays with gradients that are not all finite: a wrapper such as `optax.apply_if_finite`
    refuses the step, and a `clip_by_projected_global_norm` around it has to keep the same factor.

    Args:
      active: that of this step.
      tree, groups: the pairs.
      gradients: one `FactorPair` of stacks a group.
    """
    if not groups:
        return active
    # The largest, and not whether any entry differs from zero: compilers would put zeros beside
    # each gradient, the array in which it began to be summed. 0 for none, 1 for a gradient, 2 for
    # infinity and NaN, as integers: devices that hold different shards of the factors need to know
    # of the others'.
    kind = lambda largest: 2 - (largest < jnp.inf).astype(active.dtype) - (largest == 0)
    found = [
        tree.sharded(leaves[0]).max(kind(jnp.max(jnp.abs(stack))))
        for group, stacks in zip(groups, gradients, strict=True)
        for leaves, stack in zip(group.leaves, stacks, strict=True)
    ]
    moves = jnp.stack(found).max() == 1
    return jnp.where(moves, A_IS_ACTIVE + B_IS_ACTIVE - active, active)
