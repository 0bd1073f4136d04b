"""One step of a LoFT optimizer on the leaves of a tree: `loft_step` mapped over all pairs."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loft_jax.algorithm.pair import Blocks, FactorPair, MomentRule, Moments
from loft_jax.algorithm.step import loft_step
from loft_jax.execution.alternation import A_IS_ACTIVE, next_active
from loft_jax.execution.arguments import check_rank_axes
from loft_jax.execution.bases import (
    GroupBases,
    SmallMatrices,
    Stacks,
    group_bases,
    projected_squared_norm,
    whole_bases,
)
from loft_jax.execution.chunks import map_layers, num_chunks
from loft_jax.execution.groups import (
    FactorKind,
    Group,
    PairKind,
    compute_dtype,
    group_pairs,
    opaque_indices,
)
from loft_jax.execution.rounding import stochastic_round
from loft_jax.execution.tracing import traced_once
from loft_jax.pairs.find import PairedTree

Width = Callable[[int, int], int]


class LeafStates(NamedTuple):
    """The state of the leaves of a tree, in flat lists.

    Attributes:
      basis: for a factor its basis matrix at the last step, of the factor's shape;
        `optax.MaskedNode` for a non-LoRA parameter.
      moments: the first moments and the second, as far as the method keeps them.
    """

    basis: list[Any]
    moments: tuple[list[Any], ...] = ()


class Method(NamedTuple):
    """An optimizer, as functions of matrices.

    Attributes:
      rule: ``(dtype) ->`` the moment rule of this step.
      update_other: ``(gradient, *moments) -> (direction, *moments)`` of a non-LoRA parameter.
      blocks: which building blocks are on.
      max_norm: clips the projected global norm (block 6); None does not.
      count: ``()`` int32, the step, from which stochastic rounding draws; None without moments that
        are rounded.
    """

    rule: Callable[[jnp.dtype], MomentRule]
    update_other: Callable[..., tuple[jax.Array, ...]]
    blocks: Blocks = Blocks()
    max_norm: float | jax.Array | None = None
    count: jax.Array | None = None


def zero_state(
    tree: PairedTree,
    widths: Sequence[Width],
    dtypes: Sequence[jax.typing.DTypeLike | None],
    factor_dtypes: Sequence[jax.typing.DTypeLike | None] | None = None,
) -> list[list[Any]]:
    """Returns zero bases and moments, each laid out and sharded like its parameter.

    Args:
      tree: the parameters.
      widths: for each moment ``(m, r) ->`` numbers of state per row of a factor.
      dtypes: for each moment its dtype, None for that of the computation.
      factor_dtypes: for each moment its dtype for factors, None for the same as of other leaves.

    Raises:
      ValueError: an Explicit mesh shards a rank axis.
    """
    check_rank_axes(tree)
    # Each array is made anew: one that served twice could not be donated to a compiled step.
    basis: list[Any] = [optax.MaskedNode() for _ in tree.leaves]
    moments = [
        [jnp.zeros_like(x, dtype=dtype or compute_dtype(x)) for x in tree.leaves]
        for dtype in dtypes
    ]
    of_factors = factor_dtypes or [None] * len(widths)
    for pair in tree.pairs:
        for k, layout, rows in ((pair.a, pair.layout_a, pair.m), (pair.b, pair.layout_b, pair.n)):
            basis[k] = jnp.zeros_like(tree.leaves[k], dtype=compute_dtype(tree.leaves[k]))
            for moment, width, dtype in zip(moments, widths, of_factors, strict=True):
                resized = resize_axis(moment[k], layout.rank, width(rows, pair.r))
                moment[k] = resized if dtype is None else resized.astype(dtype)
    return [basis, *moments]


def resize_axis(zeros: jax.Array, axis: int, size: int) -> jax.Array:
    """Returns zeros with another size of one axis, sharded as before along the others."""
    if zeros.shape[axis] == size:
        return zeros
    column = jax.lax.slice_in_dim(zeros, 0, 1, axis=axis)
    return jnp.broadcast_to(column, (*zeros.shape[:axis], size, *zeros.shape[axis + 1 :]))


@jax.default_matmul_precision("highest")  # bfloat16 products would drown the cross terms
def update_leaves(
    tree: PairedTree,
    method: Method,
    gradients: list[jax.Array],
    active: jax.Array,
    before: LeafStates,
) -> tuple[list[jax.Array], jax.Array, LeafStates]:
    """One step on flat lists of leaves: the directions, the next active factor, the new state."""
    groups, blocks = group_pairs(tree), method.blocks
    stacks = [group.stack(tree.leaves) for group in groups]
    previous = [group.stack(before.basis) for group in groups] if before.basis else None
    indices = opaque_indices(groups, active)
    bases = group_bases(groups, stacks, previous, blocks, indices)
    a_is_active = active == A_IS_ACTIVE

    if method.max_norm is not None:
        one_moves = a_is_active if blocks.alternate else None
        gradients = clip_gradients(tree, groups, gradients, bases, one_moves, method.max_norm)
    gradient_stacks = [group.stack(gradients) for group in groups]
    upcoming = next_active(active, tree, groups, gradient_stacks)

    directions = list(gradients)
    after = LeafStates(list(before.basis), tuple(map(list, before.moments)))
    for k in tree.others:
        directions[k], *new = method.update_other(gradients[k], *(x[k] for x in before.moments))
        for moments, value in zip(after.moments, new, strict=True):
            moments[k] = value
    rules = {kind.dtype: method.rule(kind.dtype) for group in groups for kind in group.kind.factors}
    for group, of_gradients, of_bases in zip(groups, gradient_stacks, bases, strict=True):
        rule = rules[group.kind.factors.a.dtype]
        arrays = GroupArrays(of_gradients, tuple(map(group.stack, before.moments)))
        new = traced_once(
            _step_of_group,
            group.kind,
            rule,
            blocks,
            _chunks_of_group(group.kind, rule),
            method.count,
            a_is_active,
            arrays,
            of_bases,
        )
        group.unstack(new.updates, directions, gradients, indices)
        if before.basis:
            group.unstack(of_bases.matrices, after.basis, before.basis, indices)
        for stack, moments, old in zip(new.moments, after.moments, before.moments, strict=True):
            group.unstack(stack, moments, old, indices)
    return directions, upcoming, after


def check_max_norm(max_norm: float | jax.Array | None) -> None:
    """Raises ValueError unless a Python number is a norm to clip by; arrays are not looked at."""
    if isinstance(max_norm, (int, float)) and not max_norm > 0:
        raise ValueError(f"max_norm must be above 0, got {max_norm}; None does not clip")


def clip_gradients(
    tree: PairedTree,
    groups: Sequence[Group],
    gradients: list[jax.Array],
    bases: Sequence[GroupBases],
    a_is_active: jax.Array | None,
    max_norm: float | jax.Array,
) -> list[jax.Array]:
    """Scales all gradients by ``min(1, max_norm / projected global norm)`` (block 6)."""
    wide = lambda k: gradients[k].astype(compute_dtype(tree.leaves[k]))
    terms = [tree.sharded(k).sum(jnp.sum(wide(k) ** 2)) for k in tree.others]
    terms += [
        projected_squared_norm(group.kind, group.stack(gradients), of_group, a_is_active)
        for group, of_group in zip(groups, bases, strict=True)
    ]
    norm = jnp.sqrt(jnp.stack(terms).sum()) if terms else jnp.zeros([])
    # Not max_norm / norm: a zero norm leaves the gradients alone.
    factor = jnp.where(norm > max_norm, max_norm / jnp.where(norm > 0, norm, 1), 1)
    # A norm that is not a number must not pass for a small one.
    factor = jnp.where(jnp.isnan(norm), norm, factor)
    return [(g * factor).astype(g.dtype) for g in gradients]


class GroupArrays(NamedTuple):
    """What the step of a group overwrites, one chunk of layers after the other.

    Attributes:
      updates: gradients before the step and directions after it, like the updates in Optax.
      moments: as many as the method keeps.
    """

    updates: Stacks
    moments: tuple[Stacks, ...]


def _chunks_of_group(kind: PairKind, rule: MomentRule) -> int:
    """Returns in how many chunks to take the layers of a group."""
    (m, r), (n, _) = (factor.matrix_shape for factor in kind.factors)
    peak = rule.second_moment.peak_elements
    largest = max(peak(m, n, r), peak(n, m, r))
    return num_chunks(kind.batch, factor=kind.factor_elements, peak=largest)


def _step_of_group(
    kind: PairKind,
    rule: MomentRule,
    blocks: Blocks,
    chunks: int,
    count: jax.Array | None,
    a_is_active: jax.Array,
    arrays: GroupArrays,
    bases: GroupBases,
) -> GroupArrays:
    """One step of the pairs of a group, a chunk of layers at a time.

    The moments of a pair and its direction are computed together, while the moments are at hand: a
    second pass over them costs more than the arithmetic does where memory is slow.
    """

    def step_of_pair(
        before: GroupArrays, matrices: Stacks, small: FactorPair[SmallMatrices]
    ) -> GroupArrays:
        matrices_of = [kind.matricize(stacks) for stacks in before.moments]
        moments = (Moments(*(x.a for x in matrices_of)), Moments(*(x.b for x in matrices_of)))
        directions, (new_a, new_b) = loft_step(
            rule,
            blocks,
            a_is_active,
            kind.matricize(before.updates),
            whole_bases(kind, blocks, matrices, small, bases.changed),
            FactorPair(*moments),
            kind.dims,
            math.prod(kind.batch) // chunks,
        )
        updates = FactorPair(*map(_store, kind.factors, directions, before.updates))
        new_moments = tuple(
            FactorPair(
                _store(kind.factors.a, of_a, old.a, k), _store(kind.factors.b, of_b, old.b, k)
            )
            # The second moment, which changes by a thousandth a step, is rounded stochastically.
            for of_a, of_b, old, k in zip(new_a, new_b, before.moments, (None, count), strict=False)
        )
        return GroupArrays(updates, new_moments)

    return map_layers(step_of_pair, kind.batch, chunks)(arrays, bases.matrices, bases.small)


def _store(
    factor: FactorKind, x: jax.Array | None, old: jax.Array, count: jax.Array | None = None
) -> jax.Array:
    """Lays a matrix out like the array that it replaces, in its dtype.

    With the step's ``count`` it is rounded stochastically.
    """
    assert x is not None
    x = x if count is None else stochastic_round(x, old.dtype, count)
    return factor.unmatricize(x, old.dtype)
