"""The bases of all factors of a tree, related to the last step's, and the norm of block 6."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from loft_jax.algorithm.basis import Basis, orthonormal_bases, scale_gradient
from loft_jax.algorithm.pair import Blocks, CalibratedBasis, FactorPair
from loft_jax.algorithm.sharded_dim import ShardedDim
from loft_jax.algorithm.step import calibrate_basis
from loft_jax.execution.batching import batched_over_groups
from loft_jax.execution.chunks import map_in_chunks, num_chunks
from loft_jax.execution.groups import Group, Indices, PairKind, compute_dtype

Stacks = FactorPair[jax.Array]
"""Arrays of both factors of all pairs of a group, batch axes first, else as the factors lie."""


class SmallMatrices(NamedTuple):
    """The ``r x r`` matrices of a basis; `CalibratedBasis` has them with the basis matrix."""

    l_inv: jax.Array
    calibration: jax.Array | None


class GroupBases(NamedTuple):
    """The bases of a group.

    Attributes:
      matrices: the basis matrices, stacks as the factors lie.
      small: the ``r x r`` matrices of each basis, with the batch axes.
      changed: ``()``, whether a basis of any layer differs from the last step's; None if unknown.
    """

    matrices: Stacks
    small: FactorPair[SmallMatrices]
    changed: FactorPair[jax.Array | None]


def group_bases(
    groups: Sequence[Group],
    params: Sequence[Stacks],
    previous: Sequence[Stacks] | None,
    blocks: Blocks,
    indices: Indices | None = None,
) -> list[GroupBases]:
    """Returns the bases of the factors of each group.

    Short stacks are computed together, so that the ``r x r`` work of a program is batched across
    all groups. Long ones are computed chunk by chunk, each basis written over the last step's.

    Args:
      groups: the pairs.
      params: the factors of each group.
      previous: their basis matrices at the last step; None calibrates nothing.
      blocks: which building blocks are on.
      indices: those of `opaque_indices`.
    """
    kinds = [group.kind for group in groups]
    chunks = [num_chunks(kind.batch, factor=kind.factor_elements) for kind in kinds]
    before = [None] * len(groups) if previous is None else previous
    found: dict[int, GroupBases] = {}
    together = [k for k, count in enumerate(chunks) if count == 1]
    pick = lambda values: [values[k] for k in together]
    bases = _bases_together(pick(kinds), pick(params), pick(before), blocks, indices)
    found.update(zip(together, bases, strict=True))
    for k, count in enumerate(chunks):
        if count > 1:
            found[k] = _bases_in_chunks(kinds[k], params[k], before[k], blocks, count)
    return [found[k] for k in range(len(groups))]


def whole_bases(
    kind: PairKind,
    blocks: Blocks,
    matrices: Stacks,
    small: FactorPair[SmallMatrices],
    changed: FactorPair[jax.Array | None],
) -> FactorPair[CalibratedBasis]:
    """Returns both bases of one pair from its part of a `GroupBases`."""

    def whole(
        matrix: jax.Array, small: SmallMatrices, changed: jax.Array | None, dim: ShardedDim
    ) -> CalibratedBasis:
        q, raw = (None, matrix) if blocks.keep_raw else (matrix, None)
        return CalibratedBasis(Basis(q, small.l_inv, raw, dim), small.calibration, changed)

    return FactorPair(*map(whole, kind.matricize(matrices), small, changed, kind.dims))


def projected_squared_norm(
    kind: PairKind,
    gradients: Stacks,
    bases: GroupBases,
    a_is_active: jax.Array | None,
) -> jax.Array:
    """Returns the squared norm of the projected gradients of a group's pairs (block 6).

    ``|G P_V|_F^2`` where ``a`` is active, else ``|P_U G|_F^2``; with None, where both factors move,
    ``|G P_V + P_U G|_F^2``. The sum over all layers and all shards of a shard_map.
    """

    def of_pair(
        gradients: Stacks, matrices: Stacks, small: FactorPair[SmallMatrices]
    ) -> tuple[jax.Array, ...]:
        own = kind.matricize(gradients)
        basis_a, basis_b = whole_bases(kind, Blocks(), matrices, small, FactorPair(None, None))
        h_a, h_b = scale_gradient(own.a, basis_b.basis), scale_gradient(own.b, basis_a.basis)
        norms = kind.dims.a.sum(jnp.sum(h_a * h_a)), kind.dims.b.sum(jnp.sum(h_b * h_b))
        if a_is_active is not None:
            return norms
        # 2 <G P_V, P_U G> is twice the squared norm of P_U G P_V.
        shared = kind.dims.a.sum(basis_a.basis.matrix.T @ h_a)
        return (*norms, 2 * jnp.sum(shared * shared))

    per_layer = kind.over_batch(of_pair)(gradients, bases.matrices, bases.small)
    of_a, of_b, *cross = (kind.layers.sum(jnp.sum(x)) for x in per_layer)
    if a_is_active is not None:
        return jnp.where(a_is_active, of_a, of_b)
    return of_a + of_b + cross[0]


def _bases_together(
    kinds: Sequence[PairKind],
    params: Sequence[Stacks],
    previous: Sequence[Stacks | None],
    blocks: Blocks,
    indices: Indices | None = None,
) -> list[GroupBases]:
    bases = orthonormal_bases(
        [
            matrix
            for kind, stacks in zip(kinds, params, strict=True)
            for matrix in kind.over_batch(kind.matricize)(stacks)
        ],
        [kind.scale for kind in kinds for _ in range(2)],
        [dim for kind in kinds for dim in kind.dims],
        keep_raw=blocks.keep_raw,
        precision=blocks.precision,
        map_small=functools.partial(batched_over_groups, indices=indices),
    )
    pairs = zip(bases[::2], bases[1::2], strict=True)
    return [
        _calibrated(kind, FactorPair(*of_group), before, blocks)
        for kind, of_group, before in zip(kinds, pairs, previous, strict=True)
    ]


def _calibrated(
    kind: PairKind, bases: FactorPair[Basis], previous: Stacks | None, blocks: Blocks
) -> GroupBases:
    """Relates the bases of a group to those of the last step, and lays them out as the factors."""
    found = []
    for factor, basis, before in zip(kind.factors, bases, previous or (None, None), strict=True):
        relate = lambda before, basis, factor=factor: calibrate_basis(
            None if before is None else factor.matricize(before), basis, blocks
        )
        calibrated = kind.over_batch(relate)(before, basis)
        stored = basis.matrix.dtype if before is None else before.dtype
        unmatricize = functools.partial(factor.unmatricize, dtype=stored)
        matrix = kind.over_batch(unmatricize)(basis.matrix)
        changed = calibrated.changed
        if changed is not None:
            # One flag for all layers, everywhere: they take the same branch.
            changed = kind.layers.max(jnp.any(changed))
        found.append((matrix, SmallMatrices(basis.l_inv, calibrated.calibration), changed))
    return GroupBases(*(FactorPair(*pair) for pair in zip(*found, strict=True)))


def _bases_in_chunks(
    kind: PairKind, params: Stacks, previous: Stacks | None, blocks: Blocks, chunks: int
) -> GroupBases:
    """The same, a chunk of layers at a time."""

    def of_chunk(state: Any, params: Stacks) -> Any:
        before, _, _ = state
        (new,) = _bases_together([kind], [params], [before if calibrates else None], blocks)
        ones = jnp.ones(params.a.shape[: len(kind.batch)], bool)
        return new.matrices, new.small, jax.tree.map(lambda flag: flag & ones, new.changed)

    calibrates = previous is not None
    before = jax.tree.map(_zeros, params) if previous is None else previous
    shapes = jax.eval_shape(of_chunk, (before, None, None), params)

    def empty(x: jax.ShapeDtypeStruct) -> jax.Array:
        # Inside a shard_map zeros must vary between devices as what replaces them does: the small
        # matrices are sums over the rows, and the flags say the same everywhere.
        zero = kind.dims.a.sum(_zeros(params.a[(..., *[0] * (params.a.ndim - len(kind.batch)))]))
        if x.dtype == bool:
            return kind.layers.max(zero) > 1
        return (zero[(..., *[None] * (len(x.shape) - zero.ndim))] + jnp.zeros(x.shape)).astype(
            x.dtype
        )

    state = (before, *jax.tree.map(empty, shapes[1:]))
    matrices, small, flags = map_in_chunks(of_chunk, kind.batch, chunks)(state, params)
    return GroupBases(matrices, small, jax.tree.map(jnp.any, flags))


def _zeros(x: jax.Array) -> jax.Array:
    return jnp.zeros_like(x, dtype=compute_dtype(x))
