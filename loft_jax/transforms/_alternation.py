"""Whose turn it is to move: block 1, alternating updates.

The turn passes from one factor to the other after every step that had a gradient for an adapter.
A step without one (an all-zero gradient) does not use the turn up. So where a model starts with a
zero head above the adapters, whose gradient at step 1 is zero, the first factor moves at step 2,
where a strict alternation would spend step 2 on the factor whose partner is still zero.

Which factor moves never touches the moments, and at full rank either factor realises the full
step, so the rule keeps every exactness of the method. Bias corrections count all steps, as AdamW's.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from loft_jax._pairs import PairedTree

FactorName = Literal["a", "b"]


def check_factor_name(value: str, argument: str = "moves_first") -> None:
    """Raises ValueError unless the name of a factor is given."""
    if value not in ("a", "b"):
        raise ValueError(f"{argument} must be 'a' or 'b', got {value!r}")


def a_moves(turn: jax.Array, moves_first: str) -> jax.Array:
    """Returns whether ``a`` moves at this turn (0 or 1); else ``b`` does."""
    return turn == (0 if moves_first == "a" else 1)


def next_turn(turn: jax.Array, tree: PairedTree, gradients: Sequence[jax.Array]) -> jax.Array:
    """Returns the turn of the next step: the other one, if any factor has a gradient."""
    if not tree.pairs:
        return turn
    factors = [k for pair in tree.pairs for k in (pair.a, pair.b)]
    # The largest, and not whether any entry differs from zero: compilers would put zeros beside
    # each gradient, the array in which it began to be summed. Not a number differs from zero.
    # As integers: devices that have parts of the factors each have to know of the others'.
    here = [(jnp.max(jnp.abs(gradients[k])) != 0).astype(turn.dtype) for k in factors]
    seen = [tree.parts(k).max(x) for k, x in zip(factors, here, strict=True)]
    return jnp.where(jnp.stack(seen).any(), 1 - turn, turn)
