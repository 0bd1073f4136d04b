"""The axes of a factor: which enumerate adapters, which are its rows, which is the rank."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from loft_jax.algorithm.sharded_dim import ShardedDim
from loft_jax.pairs.shard_map import Split


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraAxes:
    """How to read the axes of a pair of factors.

    Attributes:
      batch: axes of both factors that enumerate independent adapters (stacked layers).
      rank_a: the rank axis of ``a``; the other axes of ``a`` that are not batch axes are its rows.
      rank_b: the rank axis of ``b``; None is its first axis that is not a batch axis.

    Raises:
      TypeError: ``batch`` is not a tuple.

    Example:
      >>> LoraAxes(batch=(1,))  # (in, layers, r) and (r, layers, out)
      LoraAxes(batch=(1,), rank_a=-1, rank_b=None)
    """

    batch: tuple[int, ...] = ()
    rank_a: int = -1
    rank_b: int | None = None

    def __post_init__(self):
        if not isinstance(self.batch, tuple):
            raise TypeError(f"LoraAxes: batch is a tuple of axes, (0,) for one, got {self.batch!r}")


class FactorLayout(NamedTuple):
    """How one factor lies in its array: which axes are batch, rows and rank."""

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    rank: int

    def matricize(self, x: jax.Array) -> jax.Array:
        """Returns ``x`` as ``(*batch, dimension, width)``; its rank axis may have any width."""
        x = jnp.transpose(x, (*self.batch, *self.rows, self.rank))
        return x.reshape(*x.shape[: len(self.batch)], -1, x.shape[-1])

    def unmatricize(self, x: jax.Array, shape: Sequence[int]) -> jax.Array:
        """Inverse of `matricize`, for a factor of that shape (its rank axis excepted)."""
        order = (*self.batch, *self.rows, self.rank)
        sizes = [*(shape[axis] for axis in (*self.batch, *self.rows)), x.shape[-1]]
        return jnp.transpose(x.reshape(sizes), [order.index(axis) for axis in range(len(order))])

    def batch_first(self, x: jax.Array) -> jax.Array:
        """Moves the batch axes to the front; the others stay in their order."""
        return jnp.moveaxis(x, self.batch, range(len(self.batch)))

    def batch_in_place(self, x: jax.Array) -> jax.Array:
        """Inverse of `batch_first`."""
        return jnp.moveaxis(x, range(len(self.batch)), self.batch)

    @property
    def without_batch(self) -> "FactorLayout":
        """The layout of one matrix of the batch."""
        left = [
            axis for axis in range(len(self.batch) + len(self.rows) + 1) if axis not in self.batch
        ]
        return FactorLayout(
            (), tuple(left.index(axis) for axis in self.rows), left.index(self.rank)
        )


def guess_axes(shape_a: Sequence[int], shape_b: Sequence[int], where: str) -> LoraAxes:
    """Reads the axes from the shapes where there is one reading.

    Raises:
      ValueError: more than one reading, or none; the message says how to specify the axes.
    """
    dims_a, dims_b = len(shape_a), len(shape_b)
    if dims_a < 2 or dims_b < 2:
        raise ValueError(f"{where}: a factor has at least two axes")
    # How many leading batch axes there may be: equal ones, after which the ranks agree.
    counts = [
        count
        for count in range(min(dims_a, dims_b) - 1)
        if tuple(shape_a[:count]) == tuple(shape_b[:count]) and shape_a[-1] == shape_b[count]
    ]
    stacked_matrices = dims_a == dims_b and dims_a - 2 in counts
    one_matrix = 0 in counts and dims_a > 2 and dims_b > 2
    if one_matrix or (len(counts) > 1 and not stacked_matrices):
        raise ValueError(
            f"{where}: ambiguous. Use "
            "LoraPairs(axes=LoraAxes(batch=(0,))) for layers stacked on axis 0, batch=(1,) for "
            "(in, layers, r) and (r, layers, out), batch=(-1,) for layers on the last axis with "
            "rank_a=1 and rank_b=0, batch=() for one matrix"
        )
    # As many as there can be: of four axes each, (layers, experts, in, r) is the likely reading.
    return LoraAxes(batch=tuple(range(max(counts, default=0))))


def layout_hint(shape_a: Sequence[int], shape_b: Sequence[int]) -> str:
    """Names the axes to specify for two layouts that other libraries have."""
    if len(shape_a) == len(shape_b) == 2 and shape_a[0] == shape_b[1]:
        found, axes = "have PyTorch's layout", "rank_a=0, rank_b=-1"
    elif (
        len(shape_a) == len(shape_b) == 3
        and shape_a[-1] == shape_b[-1]
        and shape_a[1] == shape_b[0]
    ):
        found, axes = "be stacked on the last axis", "batch=(-1,), rank_a=1, rank_b=0"
    else:
        return ""
    return f". They seem to {found}: use LoraPairs(axes=LoraAxes({axes}))"


def read_layout(
    shape: Sequence[int], batch: Sequence[int], rank: int | None, where: str
) -> FactorLayout:
    """Returns the layout of a factor with these axes.

    Raises:
      ValueError: axes that the shape does not have, that repeat, or that leave no matrix.
    """
    dims = len(shape)
    if any(not -dims <= axis < dims for axis in (*batch, rank or 0)):
        raise ValueError(f"{where}: axes {tuple(batch)} and {rank} are not all axes of {shape}")
    batch = tuple(axis % dims for axis in batch)
    if len(set(batch)) < len(batch):
        raise ValueError(f"{where}: the batch axes {batch} repeat an axis")
    free = [axis for axis in range(dims) if axis not in batch]
    if len(free) < 2:
        raise ValueError(f"{where}: batch axes {batch} leave no matrix of {tuple(shape)}")
    rank = free[0] if rank is None else rank % dims
    if rank in batch:
        raise ValueError(f"{where}: the rank axis {rank} is among the batch axes {batch}")
    return FactorLayout(batch, tuple(axis for axis in free if axis != rank), rank)


def sharded_rows(layout: FactorLayout, split: Split, path: str) -> ShardedDim:
    """Returns how a `jax.shard_map` shards the rows of a factor.

    Raises:
      ValueError: the rank is sharded, or a row axis after the first, whose shards are not blocks of
        consecutive rows.
    """
    first, *others = layout.rows
    for axis in (layout.rank, *others):
        if split[axis]:
            raise ValueError(
                f"{path}: a shard_map shards axis {axis} over {split[axis]}. Shard the first row "
                "axis of a factor, or batch axes; the rank axis must stay whole"
            )
    return ShardedDim(split[first])
