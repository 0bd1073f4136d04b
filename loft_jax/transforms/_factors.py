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
from loft_jax._pairs import LoraPairs, Pair, PairedTree, find_pairs
from loft_jax._rows import Rows

# Numbers held at once on the way to new moments, over all devices: few beside a model that needs
# turns, many enough for efficient products.
_TURN_ENTRIES = 2**23
_LAYERS_A_TURN = 8


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
        """Stacks this factor's entries, ``(pairs, *batch, rows, width)``, in ``dtype``."""
        stack = jnp.stack([leaves[k] for k in self.leaves])
        return jax.vmap(self.layout.tall)(stack).astype(self.dtype)

    def put(self, stack: jax.Array, leaves: list[Any], like: Sequence[Any]) -> None:
        """Inverse of `tall`: writes a stack to ``leaves``, in the dtypes of ``like``."""
        arrays = jax.vmap(functools.partial(self.layout.untall, shape=self.shape))(stack)
        for k, array in zip(self.leaves, arrays, strict=True):
            leaves[k] = array.astype(like[k].dtype)


class Group(NamedTuple):
    """Pairs that differ in nothing but their layer: computed as one batch.

    Program size and compile time then follow the number of different adapters of a layer, not of
    layers. Only paths that differ in nothing but numbers are stacked: layers of one kind, which are
    sharded alike, where weights of one shape need not be (a column- and a row-parallel one).

    Attributes:
      a, b: the two factors.
      batch: batch axes of their stacks, the stacking first.
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

    def over_batch(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Maps a function of matrices over the batch axes of stacks."""
        for _ in self.batch:
            fn = jax.vmap(fn)
        return fn

    def turns(self, entries: int) -> int:
        """In how many turns to take the stack, where a matrix needs so many numbers on its way."""
        return _turn_count(self.batch[self._long_axis], entries * math.prod(self.batch))

    @property
    def _long_axis(self) -> int:
        return next((k for k, size in enumerate(self.batch) if size > 1), 0)

    def in_turns(self, fn: Callable[..., Any], turns: int) -> Callable[..., Any]:
        """`over_batch`, but for a part of the stack at a time.

        The compiler would hold what ``fn`` makes on its way for all matrices at once. A turn takes
        every so many-th layer: where layers are split over up to `_LAYERS_A_TURN` devices, each
        device then works on its own in every turn.
        """
        mapped, axis = self.over_batch(fn), self._long_axis
        if turns == 1:
            return mapped

        def taking_turns(*args: Any) -> Any:
            cut = lambda x: x.reshape(*x.shape[:axis], -1, turns, *x.shape[axis + 1 :])
            parts = jax.tree.map(cut, args)

            def turn(_: None, k: jax.Array) -> tuple[None, Any]:
                take = lambda x: jax.lax.dynamic_index_in_dim(x, k, axis + 1, keepdims=False)
                return None, mapped(*jax.tree.map(take, parts))

            join = lambda x: jnp.moveaxis(x, 0, axis + 1).reshape(*self.batch, *x.shape[axis + 2 :])
            return jax.tree.map(join, jax.lax.scan(turn, None, jnp.arange(turns))[1])

        return taking_turns

    def of_factors(self, fn: Callable[..., Any], params: Sequence[jax.Array]) -> dict[Factor, Any]:
        """Returns a function of a tall matrix, such as its frame, for both factors."""
        of = lambda factor: self.over_batch(functools.partial(fn, rows=factor.rows))
        return {factor: of(factor)(factor.tall(params)) for factor in (self.a, self.b)}


def _turn_count(layers: int, entries: int) -> int:
    """Returns in how many turns to take layers of so many entries, a divisor of their number."""
    wanted = -(-entries // _TURN_ENTRIES)
    even = [k for k in range(1, layers + 1) if layers % k == 0 and k <= layers // _LAYERS_A_TURN]
    whole = [k for k in even if (layers // k) % _LAYERS_A_TURN == 0] or even or [1]
    return min((k for k in whole if k >= wanted), default=max(whole))


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
        found.append(Group(a, b, (len(members), *one.batch), scale, layers))
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
    return tree, gradients


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
