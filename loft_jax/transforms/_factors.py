"""What the transformations share: the factors of a pair as tall matrices, checks of arguments."""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loft_jax._axes import FactorLayout
from loft_jax._frame import Frame, orthonormal_frames
from loft_jax._pairs import LoraPairs, Pair, PairedTree, find_pairs
from loft_jax._rows import Rows
from loft_jax.transforms._turns import turn_count

Sides = tuple[Any, ...]
"""Something of each factor of a pair: of ``a``, and of ``b``."""
Frames = tuple[Frame, Frame]


class Factor(NamedTuple):
    """The same factor of every pair of a group, as one stack of tall matrices.

    Attributes:
      leaves: positions of the factors among the leaves of the tree.
      layout: how each lies in its array.
      shape: the shape of each array.
      dtype: what to compute in: that of either factor of the pair, at least float32.
      rows: how the rows are spread over the devices of a shard_map.
    """

    leaves: tuple[int, ...]
    layout: FactorLayout
    shape: tuple[int, ...]
    dtype: jnp.dtype
    rows: Rows

    def tall(self, leaves: Sequence[Any]) -> jax.Array:
        """Stacks this factor's entries, ``(*batch, rows, width)`` with the group's batch axes."""
        return self._each(self.layout.tall)(self._gather(leaves)).astype(self.dtype)

    def put(self, stack: jax.Array, leaves: list[Any], like: Sequence[Any]) -> None:
        """Inverse of `tall`: writes a stack to ``leaves``, in the dtypes of ``like``."""
        self._scatter(
            self._each(functools.partial(self.layout.untall, shape=self.shape))(stack), leaves, like
        )

    def stack(self, leaves: Sequence[Any]) -> jax.Array:
        """Stacks this factor's entries as they lie, ``(*batch, *axes of a matrix)``.

        `tall_matrix` makes the tall matrix of one of them. Done there, and not to all at once, a
        transposition stays in the cache.
        """
        return self._each(self.layout.batch_first)(self._gather(leaves))

    def unstack(self, stack: jax.Array, leaves: list[Any], like: Sequence[Any]) -> None:
        """Inverse of `stack`: writes to ``leaves``, in the dtypes of ``like``."""
        self._scatter(self._each(self.layout.batch_in_place)(stack), leaves, like)

    def tall_matrix(self, x: jax.Array) -> jax.Array:
        """One matrix of a `stack` as ``(rows, width)``, in ``dtype``."""
        return self.layout.of_matrix.tall(x).astype(self.dtype)

    def untall_matrix(self, x: jax.Array) -> jax.Array:
        """Inverse of `tall_matrix`, but for the dtype."""
        shape = [size for axis, size in enumerate(self.shape) if axis not in self.layout.batch]
        return self.layout.of_matrix.untall(x, shape)

    # An array alone is its own stack. It is not given another axis: even a reshape keeps the
    # compiler from updating a donated array in place.

    def _each(self, fn: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
        return fn if len(self.leaves) == 1 else jax.vmap(fn)

    def _gather(self, leaves: Sequence[Any]) -> jax.Array:
        members = [jnp.asarray(leaves[k]) for k in self.leaves]
        return members[0] if len(members) == 1 else jnp.stack(members)

    def _scatter(self, stack: jax.Array, leaves: list[Any], like: Sequence[Any]) -> None:
        for k, array in zip(self.leaves, [stack] if len(self.leaves) == 1 else stack, strict=True):
            leaves[k] = array.astype(like[k].dtype)


class Group(NamedTuple):
    """Pairs that differ in nothing but their layer: computed as one batch.

    Program size and compile time then follow the number of different adapters of a layer, not of
    layers. Only paths that differ in nothing but numbers are stacked: layers of one kind, which are
    sharded alike, where weights of one shape need not be (a column- and a row-parallel one).

    Attributes:
      a, b: the two factors.
      batch: batch axes of their stacks: the stacking, where there are several pairs, then those of
        the arrays.
      scale: the adapters' own scale.
      layers: how the batch axes are spread over the devices of a shard_map.
    """

    a: Factor
    b: Factor
    batch: tuple[int, ...]
    scale: float
    layers: Rows

    @property
    def sides(self) -> tuple[tuple[Factor, Factor], tuple[Factor, Factor]]:
        """``(a, b)`` and ``(b, a)``: each factor with the partner it is projected on.

        Everything is written once, for a factor and its partner. The side of ``b`` is that of ``a``
        with the roles exchanged and the gradient transposed.
        """
        return (self.a, self.b), (self.b, self.a)

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """``(m, r)`` and ``(n, r)`` of the tall matrices."""
        shape_a, shape_b = (
            (math.prod(f.shape[axis] for axis in f.layout.rows), f.shape[f.layout.rank])
            for f in (self.a, self.b)
        )
        return shape_a, shape_b

    @property
    def longest(self) -> int:
        """Numbers of the larger factor of a layer."""
        return max(map(math.prod, self.shapes))

    def stacks(self, leaves: Sequence[Any]) -> Sides:
        """The entries of both factors, stacks of them as they lie: `Factor.stack`."""
        return self.a.stack(leaves), self.b.stack(leaves)

    def unstack(self, stacks: Sides, leaves: list[Any], like: Sequence[Any]) -> None:
        """Inverse of `stacks`: writes to ``leaves``, in the dtypes of ``like``."""
        for factor, stack in zip((self.a, self.b), stacks, strict=True):
            factor.unstack(stack, leaves, like)

    def tall_matrices(self, pair: Sides) -> Sides:
        """Of one of `stacks`' pairs the tall matrices, ``(m, width)`` and ``(n, width)``."""
        return self.a.tall_matrix(pair[0]), self.b.tall_matrix(pair[1])

    def untall_matrices(self, matrices: Sequence[jax.Array], like: Sides) -> Sides:
        """Inverse of `tall_matrices`, in the dtypes of ``like``."""
        return tuple(
            factor.untall_matrix(x).astype(old.dtype)
            for factor, x, old in zip((self.a, self.b), matrices, like, strict=True)
        )

    def tall(self, stacks: Sides) -> Sides:
        """`tall_matrices` of all pairs: ``(*batch, m, width)`` and ``(*batch, n, width)``."""
        return self.over_batch(lambda *pair: self.tall_matrices(pair))(*stacks)

    def untall(self, matrices: Sequence[jax.Array], like: Sides) -> Sides:
        """Inverse of `tall`, in the dtypes of ``like``."""
        return self.over_batch(lambda a, b, *like: self.untall_matrices((a, b), like))(
            *matrices, *like
        )

    def over_batch(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Maps a function of matrices over the batch axes of stacks."""
        for _ in self.batch:
            fn = jax.vmap(fn)
        return fn


def factor_frames(
    groups: Sequence[Group],
    stacks: Sequence[Sides],
    make: Callable[..., list[Frame]] = orthonormal_frames,
) -> list[Frames]:
    """Returns for each group the frames of its two factors, stacks of them, made all at once."""
    frames = make(
        [x for group, pair in zip(groups, stacks, strict=True) for x in group.tall(pair)],
        [group.scale for group in groups for _ in range(2)],
        [factor.rows for group in groups for factor in (group.a, group.b)],
    )
    return list(zip(frames[::2], frames[1::2], strict=True))


def early_frames(
    groups: Sequence[Group],
    stacks: Sequence[Sides],
    make: Callable[..., list[Frame]] = orthonormal_frames,
) -> list[Frames | None]:
    """`factor_frames`, but None for groups whose factors are so long that they take turns."""
    early = [k for k, group in enumerate(groups) if turn_count(group.batch, group.longest) == 1]
    frames = factor_frames([groups[k] for k in early], [stacks[k] for k in early], make)
    found = dict(zip(early, frames, strict=True))
    return [found.get(k) for k in range(len(groups))]


def group_pairs(tree: PairedTree) -> list[Group]:
    """Returns the pairs of a tree in groups that can be computed as one batch."""
    groups: dict[tuple, list[Pair]] = {}
    for pair in tree.pairs:
        leaves = [tree.leaves[k] for k in (pair.a, pair.b)]
        kinds = tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
        role = re.sub(r"\d+", "#", tree.paths[pair.a])
        split = tuple(tree.splits[k] for k in (pair.a, pair.b))
        key = (role, kinds, split, pair.layout_a, pair.layout_b, pair.scale)
        groups.setdefault(key, []).append(pair)
    found = []
    for (_, kinds, (split_a, _), layout_a, layout_b, scale), members in groups.items():
        (shape_a, dtype_a), (shape_b, dtype_b) = kinds
        dtype = jnp.promote_types(jnp.promote_types(dtype_a, dtype_b), jnp.float32)
        one = members[0]
        a = Factor(tuple(p.a for p in members), layout_a, shape_a, dtype, one.rows_a)
        b = Factor(tuple(p.b for p in members), layout_b, shape_b, dtype, one.rows_b)
        layers = Rows(tuple(name for axis in layout_a.batch for name in split_a[axis]))
        stacking = (len(members),) if len(members) > 1 else ()
        found.append(Group(a, b, (*stacking, *one.batch), scale, layers))
    return found


def leaves_outside(tree: PairedTree) -> list[int]:
    """Positions of the leaves that belong to no pair."""
    inside = {k for pair in tree.pairs for k in (pair.a, pair.b)}
    return [k for k in range(len(tree.leaves)) if k not in inside]


def compute_dtype(array: Any) -> jnp.dtype:
    """The dtype to compute and keep state in: the array's own, but at least float32."""
    return jnp.promote_types(jnp.result_type(array), jnp.float32)


def widened(zeros: jax.Array, axis: int, width: int) -> jax.Array:
    """Returns zeros with another size of one axis, sharded as before along the others."""
    if zeros.shape[axis] == width:
        return zeros
    column = jax.lax.slice_in_dim(zeros, 0, 1, axis=axis)
    return jnp.broadcast_to(column, (*zeros.shape[:axis], width, *zeros.shape[axis + 1 :]))


def leaves_like(tree: PairedTree, other: optax.Params, name: str) -> list[Any]:
    """Returns the subtrees of ``other`` at the leaves of the parameters.

    Raises:
      ValueError: its structure is not the parameters'.
    """
    try:
        return tree.treedef.flatten_up_to(other)
    except ValueError as error:
        raise ValueError(
            f"The {name} do not have the structure of the parameters: {error}. Take gradients with "
            "respect to the parameters that the optimizer was given, and after a change of the "
            "parameters make its state anew with init."
        ) from error


def read_arguments(
    params: optax.Params | None,
    updates: optax.Updates,
    pairs: LoraPairs | None,
    *,
    parts: bool = False,
) -> tuple[PairedTree, list[Any]]:
    """Returns the parameters with their pairs, and the gradients in the order of their leaves.

    ``parts`` says that the caller sums over rows of which a shard_map gives it a part.

    Raises:
      ValueError: parameters that are missing or unpaired, a gradient that is missing or has another
        shape than its parameter; leaves that are split, for a caller that takes none.
    """
    if params is None:
        raise ValueError(
            "This works on the factors themselves: call update(grads, state, params) with params"
        )
    tree = find_pairs(params, pairs)
    if not parts and (split := [k for k in range(len(tree.leaves)) if tree.parts(k).axes]):
        raise ValueError(
            f"{tree.paths[split[0]]} is split by a shard_map, which this optimizer does not know "
            "how to sum over: call its update outside, under jit, or use a LoFT optimizer"
        )
    gradients = leaves_like(tree, updates, "gradients")
    for path, leaf, gradient in zip(tree.paths, tree.leaves, gradients, strict=True):
        is_array = hasattr(gradient, "shape") or isinstance(gradient, float)
        if not is_array or jnp.shape(gradient) != jnp.shape(leaf):
            found = (
                f"has shape {jnp.shape(gradient)}" if is_array else f"is {type(gradient).__name__}"
            )
            raise ValueError(
                f"The gradient of {path} {found}, its parameter has shape {jnp.shape(leaf)}"
            )
    # Numbers of Python's may be parameters outside pairs, as in Optax.
    as_array = lambda x: jnp.asarray(x) if isinstance(x, float) else x
    return tree._replace(leaves=list(map(as_array, tree.leaves))), list(map(as_array, gradients))


def check_state(
    tree: PairedTree,
    basis: Sequence[Any],
    moments: Sequence[Sequence[Any]],
    widths: Sequence[Callable[[int, int], int]],
) -> None:
    """Raises ValueError where the state has not the shapes of these parameters and this method.

    ``widths[i](rows, r)`` is the number of entries per row of a factor of ``moments[i]``.
    """
    expected = {k: [None, *[jnp.shape(tree.leaves[k])] * len(widths)] for k in leaves_outside(tree)}
    for pair in tree.pairs:
        for k, layout, rows in ((pair.a, pair.layout_a, pair.m), (pair.b, pair.layout_b, pair.n)):
            shape, rank = jnp.shape(tree.leaves[k]), layout.rank
            wide = [(*shape[:rank], w(rows, pair.r), *shape[rank + 1 :]) for w in widths]
            expected[k] = [shape, *wide]
    for k, shapes in expected.items():
        found = [getattr(x, "shape", None) for x in (basis[k], *(m[k] for m in moments))]
        if found != shapes:
            kind = "leaf" if shapes[0] is None else "factor"
            raise ValueError(
                f"The state of {tree.paths[k]} is not for a {kind} of shape "
                f"{jnp.shape(tree.leaves[k])}: its basis and moments have shapes {found}, not "
                f"{shapes}. After a change of rank, of second_moment or of the pairs, make it anew "
                "with init"
            )
