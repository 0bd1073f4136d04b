"""Full fine-tuning whose steps have the rank of an adapter's: a bound for renewals.

A step of LoFT changes each weight by a matrix of rank r in a subspace that it chose earlier. AdamW
whose step is cut to its r leading singular vectors has the best subspace at every step, and all of
AdamW's memory. What it loses to AdamW is lost by steps of low rank alone, however an adapter's
subspaces are chosen. With feedback nothing is lost: the rest is added to the next step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class _State(NamedTuple):
    """Per leaf: the right singular vectors of the last step, `(..., n, rank)`; the rest."""

    vectors: Any
    rest: Any


def adamw_of_rank(rank: int, feedback: bool = False) -> Callable[[Any], Any]:
    """Returns `learning rate -> AdamW` (no decay) whose updates are cut to a rank.

    Args:
      rank: of the update of each matrix; leading axes of a parameter are batched.
      feedback: whether the part that is cut off is added to the next update.
    """

    def init(params: Any) -> _State:
        start = lambda x: jnp.broadcast_to(
            jnp.eye(x.shape[-1], rank, dtype=x.dtype), (*x.shape[:-2], x.shape[-1], rank)
        )
        return _State(jax.tree.map(start, params), jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, _State]:
        del params
        whole = jax.tree.map(jnp.add, updates, state.rest) if feedback else updates
        leaves, treedef = jax.tree.flatten(whole)
        pairs = map(leading_part, leaves, jax.tree.leaves(state.vectors))
        parts, vectors = (treedef.unflatten(x) for x in zip(*pairs, strict=True))
        rest = jax.tree.map(jnp.subtract, whole, parts) if feedback else state.rest
        return parts, _State(vectors, rest)

    def optimizer(rate: Any) -> optax.GradientTransformation:
        adamw = optax.adamw(rate, weight_decay=0.0)
        return optax.chain(adamw, optax.GradientTransformation(init, update))

    return optimizer


def leading_part(x: jax.Array, vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the leading part of `x`, `(..., m, n)`, and its right vectors, `(..., n, rank)`.

    Two steps of the power iteration from the vectors of the last step, which turn slowly.
    """
    for _ in range(2):
        left = jnp.linalg.qr(x @ vectors).Q
        right = x.mT @ left
        vectors = jnp.linalg.qr(right).Q
    return left @ right.mT, vectors
