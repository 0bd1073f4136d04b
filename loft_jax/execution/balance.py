"""Balance the factors of all pairs after a step, where they need it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from loft_jax.algorithm.balance import balancing_matrices, is_unbalanced
from loft_jax.algorithm.pair import FactorPair
from loft_jax.execution.batching import batched_over_groups
from loft_jax.execution.groups import FactorKind, PairKind, group_pairs, opaque_indices
from loft_jax.execution.tracing import traced_once
from loft_jax.pairs.find import PairedTree

Stacks = FactorPair[jax.Array]


@jax.default_matmul_precision("highest")
def balance_updates(
    tree: PairedTree, updates: list[Any], active: jax.Array | None = None
) -> list[Any]:
    """Returns updates to balanced factors of the same products, see `algorithm.balance`.

    Only pairs that `is_unbalanced` finds are changed. Where it finds none, as in most steps,
    nothing is computed but Gram matrices. All pairs share one branch: compile time follows the
    number of branches.

    Args:
      tree: the parameters, before the step.
      updates: of all leaves, to be added to the parameters.
      active: which factor is active: a value that is not known when the program is compiled.
    """
    groups = group_pairs(tree)
    if not groups:
        return updates
    kinds = [group.kind for group in groups]
    params = [group.stack(tree.leaves) for group in groups]
    indices = None if active is None else opaque_indices(groups, active)

    stacks = [group.stack(updates) for group in groups]
    grams = [traced_once(_grams, *of) for of in zip(kinds, params, stacks, strict=True)]
    unbalanced = _over_pairs(is_unbalanced, grams, indices)

    def balance() -> list[Stacks]:
        matrices = _over_pairs(balancing_matrices, grams, indices, where=unbalanced)
        args = zip(kinds, params, stacks, unbalanced, matrices, strict=True)
        return [traced_once(_balanced, *of) for of in args]

    # One answer for all layers, everywhere.
    flags = [kind.layers.max(jnp.any(x)) for kind, x in zip(kinds, unbalanced, strict=True)]
    stacks = jax.lax.cond(jnp.stack(flags).any(), balance, lambda: stacks)
    new = list(updates)
    for group, stack in zip(groups, stacks, strict=True):
        group.unstack(stack, new, updates, indices)
    return new


def _over_pairs(fn: Any, grams: Sequence[Stacks], indices: Any, where: Any = None) -> list[Any]:
    """Maps a function of the Gram matrices of a pair over the pairs of all groups."""
    of_matrices = lambda a, b: fn(FactorPair(a, b))
    first, second = [x.a for x in grams], [x.b for x in grams]
    return batched_over_groups(of_matrices, first, second, indices=indices, where=where)


def _grams(kind: PairKind, params: Stacks, updates: Stacks) -> Stacks:
    def of_pair(params: Stacks, updates: Stacks) -> Stacks:
        grams = []
        for factor, param, update in zip(kind.factors, params, updates, strict=True):
            moved, axes = _moved(factor, param, update), factor.layout.without_batch
            gram = jax.lax.dot_general(moved, moved, ((axes.rows, axes.rows), ((), ())))
            grams.append(factor.dim.sum(gram))
        return FactorPair(*grams)

    return kind.over_batch(of_pair)(params, updates)


def _balanced(
    kind: PairKind, params: Stacks, updates: Stacks, unbalanced: jax.Array, matrices: Stacks
) -> Stacks:
    def of_pair(params: Stacks, updates: Stacks, unbalanced: jax.Array, matrices: Stacks) -> Stacks:
        balanced = []
        for factor, matrix, param, update in zip(
            kind.factors, matrices, params, updates, strict=True
        ):
            moved, axis = _moved(factor, param, update), factor.layout.without_batch.rank
            # The product in the order that leaves the axes where they are, if there is one.
            if axis == 0:
                moved = jnp.tensordot(matrix, moved, (0, 0))
            else:
                moved = jnp.moveaxis(jnp.tensordot(moved, matrix, (axis, 0)), -1, axis)
            # The updates of other pairs stay as they are, to the last bit.
            new = (moved - param.astype(moved.dtype)).astype(update.dtype)
            balanced.append(jnp.where(unbalanced, new, update))
        return FactorPair(*balanced)

    return kind.over_batch(of_pair)(params, updates, unbalanced, matrices)


def _moved(factor: FactorKind, param: jax.Array, update: jax.Array) -> jax.Array:
    """Returns a factor after the update, in the dtype to compute in."""
    return param.astype(factor.dtype) + update.astype(factor.dtype)
