"""Groups of pairs that are computed as one batch."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from loft_jax.algorithm.pair import FactorPair
from loft_jax.algorithm.platform import traced_platform
from loft_jax.algorithm.sharded_dim import ShardedDim
from loft_jax.pairs.axes import FactorLayout
from loft_jax.pairs.find import Pair, PairedTree

Indices = list[jax.Array]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class FactorKind:
    """What the same factor of all pairs of a group has in common.

    Attributes:
      layout: how the factor lies in its array.
      shape: of the array.
      dtype: what to compute in: that of either factor of the pair, at least float32.
      dim: how a shard_map shards the rows.
    """

    layout: FactorLayout
    shape: tuple[int, ...]
    dtype: jnp.dtype
    dim: ShardedDim

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(m, r)`` of the matrix, in a shard_map of this device's part."""
        rows = math.prod(self.shape[axis] for axis in self.layout.rows)
        return rows, self.shape[self.layout.rank]

    def matricize(self, x: jax.Array) -> jax.Array:
        """Returns one matrix of a stack as ``(rows, width)``, in the dtype to compute in.

        Transposing one matrix at a time keeps the transposition in the cache.
        """
        return self.layout.without_batch.matricize(x).astype(self.dtype)

    def unmatricize(self, x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Inverse of `matricize`, in the dtype in which the array is stored."""
        shape = [size for axis, size in enumerate(self.shape) if axis not in self.layout.batch]
        return self.layout.without_batch.unmatricize(x, shape).astype(dtype)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class PairKind:
    """What the pairs of a group have in common.

    Attributes:
      factors: of ``a`` and of ``b``.
      batch: sizes of the batch axes of a stack: the stacking, where a group has several pairs, then
        those of the arrays.
      scale: the adapters' own scale.
      layers: how a shard_map shards the batch axes.
    """

    factors: FactorPair[FactorKind]
    batch: tuple[int, ...]
    scale: float
    layers: ShardedDim

    @property
    def dims(self) -> FactorPair[ShardedDim]:
        return FactorPair(self.factors.a.dim, self.factors.b.dim)

    @property
    def factor_elements(self) -> int:
        """Elements of the larger factor of one pair."""
        return max(math.prod(kind.matrix_shape) for kind in self.factors)

    def over_batch(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Maps a function of matrices over the batch axes of stacks."""
        for _ in self.batch:
            fn = jax.vmap(fn)
        return fn

    def matricize(self, pair: FactorPair[jax.Array]) -> FactorPair[jax.Array]:
        """Returns both matrices of one pair."""
        return FactorPair(self.factors.a.matricize(pair.a), self.factors.b.matricize(pair.b))


class Group(NamedTuple):
    """Pairs that differ only in their layer.

    Program size and compile time then follow the number of different adapters of a layer, not of
    layers. Only paths that differ in nothing but numbers are stacked: layers of one kind, which are
    sharded alike, where weights of one shape need not be (a column- and a row-parallel one).

    Attributes:
      kind: what they have in common.
      leaves: positions of the factors ``a``, and of ``b``, among the leaves of the tree.
    """

    kind: PairKind
    leaves: FactorPair[tuple[int, ...]]

    def stack(self, leaves: Sequence[Any]) -> FactorPair[jax.Array]:
        """Stacks the entries of both factors as they lie, ``(*batch, *axes of a matrix)``."""
        return FactorPair(
            *(
                self._stack(k, leaves, kind)
                for k, kind in zip(self.leaves, self.kind.factors, strict=True)
            )
        )

    def unstack(
        self,
        stacks: FactorPair[jax.Array],
        leaves: list[Any],
        like: Sequence[Any],
        indices: Indices | None = None,
    ) -> None:
        """Inverse of `stack`: writes to ``leaves``, in the dtypes of ``like``.

        ``indices`` are those of `opaque_indices`.
        """
        for positions, kind, stack in zip(self.leaves, self.kind.factors, stacks, strict=True):
            stack = self._each(kind.layout.batch_in_place)(stack)
            for k, array in zip(positions, self._members(stack, indices), strict=True):
                leaves[k] = array.astype(like[k].dtype)

    def matrices(self, factor: str, leaves: Sequence[Any]) -> jax.Array:
        """Returns the entries of one factor, "a" or "b", as matrices ``(*batch, rows, width)``."""
        kind = getattr(self.kind.factors, factor)
        stack = self._stack(getattr(self.leaves, factor), leaves, kind)
        return self.kind.over_batch(kind.matricize)(stack)

    def put_matrices(
        self, factor: str, matrices: jax.Array, leaves: list[Any], like: Sequence[Any]
    ) -> None:
        """Inverse of `matrices`: writes to ``leaves``, in the dtypes of ``like``."""
        kind, positions = getattr(self.kind.factors, factor), getattr(self.leaves, factor)
        unmatricize = lambda x: kind.unmatricize(x, x.dtype)
        stack = self._each(kind.layout.batch_in_place)(self.kind.over_batch(unmatricize)(matrices))
        for k, array in zip(positions, self._members(stack), strict=True):
            leaves[k] = array.astype(like[k].dtype)

    # An array alone is its own stack. It is not given another axis: even a reshape keeps the
    # compiler from updating a donated array in place.

    def _each(self, fn: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
        return fn if len(self.leaves.a) == 1 else jax.vmap(fn)

    def _stack(
        self, positions: Sequence[int], leaves: Sequence[Any], kind: FactorKind
    ) -> jax.Array:
        members = [jnp.asarray(leaves[k]) for k in positions]
        stack = members[0] if len(members) == 1 else jnp.stack(members)
        return self._each(kind.layout.batch_first)(stack)

    def _members(self, stack: jax.Array, indices: Indices | None = None) -> Sequence[jax.Array]:
        if len(self.leaves.a) == 1:
            return [stack]
        if indices is None:
            return jnp.unstack(stack)
        take = functools.partial(jax.lax.dynamic_index_in_dim, stack, keepdims=False)
        return [take(k) for k in indices[: len(stack)]]


def opaque_indices(groups: Sequence[Group], active: jax.Array) -> Indices | None:
    """Returns the indices 0, 1, ... as values that XLA for CPUs does not know when it compiles.

    A slice at a known index is a kernel of its own, and to unstack the layers of a model takes a
    thousand: most of the compile time of the optimizer. At an unknown index all slices of one shape
    share a kernel, and the step of SmolLM2's 150 pairs compiled in 4.0 s instead of 8.4. XLA looks
    through arithmetic, but not through a loop whose number of iterations it does not know, here 1.

    Returns:
      The indices, as many as a group has layers and as there are factors of groups; None where
      known ones are as good.
    """
    longest = max([2 * len(groups), *(len(group.leaves.a) for group in groups)])
    if not groups or traced_platform() != "cpu":
        return None
    iterations = jnp.minimum(active, 0) + 1
    # They begin with a value that none keeps: an index that the loop left alone would be known.
    unset = jnp.full_like(active, -1)
    known = [jnp.asarray(k, active.dtype) for k in range(longest)]
    step = lambda carry: (carry[0] + 1, known)
    _, indices = jax.lax.while_loop(
        lambda carry: carry[0] < iterations, step, (jnp.zeros_like(active), [unset] * longest)
    )
    return indices


def group_pairs(tree: PairedTree) -> list[Group]:
    """Returns the pairs of a tree in groups that can be computed as one batch."""
    groups: dict[tuple, list[Pair]] = {}
    for pair in tree.pairs:
        leaves = [tree.leaves[k] for k in (pair.a, pair.b)]
        arrays = tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
        role = re.sub(r"\d+", "#", tree.paths[pair.a])
        split = tuple(tree.splits[k] for k in (pair.a, pair.b))
        key = (role, arrays, split, pair.layout_a, pair.layout_b, pair.scale)
        groups.setdefault(key, []).append(pair)
    found = []
    for (_, arrays, (split_a, _), layout_a, layout_b, scale), members in groups.items():
        (shape_a, dtype_a), (shape_b, dtype_b) = arrays
        dtype = jnp.promote_types(jnp.promote_types(dtype_a, dtype_b), jnp.float32)
        one = members[0]
        kinds = FactorPair(
            FactorKind(layout_a, shape_a, dtype, one.dim_a),
            FactorKind(layout_b, shape_b, dtype, one.dim_b),
        )
        layers = ShardedDim(tuple(name for axis in layout_a.batch for name in split_a[axis]))
        stacking = (len(members),) if len(members) > 1 else ()
        kind = PairKind(kinds, (*stacking, *one.batch), scale, layers)
        positions = FactorPair(tuple(p.a for p in members), tuple(p.b for p in members))
        found.append(Group(kind, positions))
    return found


def compute_dtype(array: Any) -> jnp.dtype:
    """The dtype to compute and keep state in: the array's own, but at least float32."""
    return jnp.promote_types(jnp.result_type(array), jnp.float32)
