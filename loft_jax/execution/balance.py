"""Balance the factors of all pairs after a step, where they need it."""

from typing import Any

import jax
import jax.numpy as jnp

from loft_jax.algorithm.balance import Grams, balancing_matrices, is_unbalanced
from loft_jax.algorithm.pair import FactorPair
from loft_jax.execution.groups import PairKind, group_pairs, opaque_indices
from loft_jax.execution.tracing import traced_once
from loft_jax.pairs.find import PairedTree

Stacks = FactorPair[jax.Array]

# One pass leaves what it cannot see beside the Gram matrices' own rounding, from factors that were
# thousands of times too large; another one takes care of that.
_MAX_PASSES = 3


@jax.default_matmul_precision("highest")
def balance_updates(
    tree: PairedTree, updates: list[Any], active: jax.Array | None = None
) -> list[Any]:
    """Returns updates to balanced factors of the same products, see `algorithm.balance`.

    Only pairs that `is_unbalanced` finds are changed. In a group without any nothing is computed
    but Gram matrices.

    Args:
      tree: the parameters, before the step.
      updates: of all leaves, to be added to the parameters.
      active: which factor is active, a value that is not known when the program is compiled.
    """
    groups = group_pairs(tree)
    if not groups:
        return updates
    new = list(updates)
    indices = None if active is None else opaque_indices(groups, active)
    for group in groups:
        stacks = group.stack(tree.leaves), group.stack(updates)
        group.unstack(traced_once(_balance_group, group.kind, *stacks), new, updates, indices)
    return new


def _balance_group(kind: PairKind, params: Stacks, updates: Stacks) -> Stacks:
    def grams_of_pair(params: Stacks, updates: Stacks) -> Grams:
        moved = _moved(kind, params, updates)
        return FactorPair(*(dim.sum(x.T @ x) for x, dim in zip(moved, kind.dims, strict=True)))

    def balance_pair(params: Stacks, updates: Stacks, grams: Grams) -> Stacks:
        unbalanced = is_unbalanced(grams)
        balanced = FactorPair(
            *(
                factor.unmatricize(x @ matrix - factor.matricize(param), update.dtype)
                for factor, x, matrix, param, update in zip(
                    kind.factors,
                    _moved(kind, params, updates),
                    balancing_matrices(grams),
                    params,
                    updates,
                    strict=True,
                )
            )
        )
        # The updates of other pairs stay as they are, to the last bit.
        keep = lambda new, old: jnp.where(unbalanced, new, old)
        return jax.tree.map(keep, balanced, updates)

    grams_of, balance = kind.over_batch(grams_of_pair), kind.over_batch(balance_pair)

    def some_unbalanced(carry: tuple[Stacks, Grams, jax.Array]) -> jax.Array:
        _, grams, passes = carry
        # One answer for all layers, everywhere.
        some = kind.layers.max(jnp.any(kind.over_batch(is_unbalanced)(grams)))
        return some & (passes < _MAX_PASSES)

    def one_pass(carry: tuple[Stacks, Grams, jax.Array]) -> tuple[Stacks, Grams, jax.Array]:
        updates, grams, passes = carry
        updates = balance(params, updates, grams)
        return updates, grams_of(params, updates), passes + 1

    start = updates, grams_of(params, updates), jnp.zeros([], jnp.int32)
    balanced, _, _ = jax.lax.while_loop(some_unbalanced, one_pass, start)
    return balanced


def _moved(kind: PairKind, params: Stacks, updates: Stacks) -> Stacks:
    """Returns both matrices of one pair after the update."""
    old, step = kind.matricize(params), kind.matricize(updates)
    return FactorPair(old.a + step.a, old.b + step.b)
