"""Rows of a tall matrix, whole or split over devices by an enclosing `jax.shard_map`.

Under `jax.jit` an array is whole whatever its sharding, and the compiler sums over devices. Inside
a `jax.shard_map` a device sees its own rows alone, and sums over all rows must say so. That is all
the mathematics needs to know of meshes: everything else it does is row by row, or ``r x r``.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Rows:
    """How the rows of a matrix are spread: a static value, in pytrees a node without leaves.

    Attributes:
      axes: the manual mesh axes over which the rows are split, major to minor; none where whole.

    Example:
      >>> Rows().sum(jnp.ones(2))
      Array([1., 1.], dtype=float32)
    """

    axes: tuple[str, ...] = ()

    def sum(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Adds up what each part of the rows has summed."""
        return jax.lax.psum(x, self.axes) if self.axes else x

    def max(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """The largest of what each part of the rows has found."""
        return jax.lax.pmax(x, self.axes) if self.axes else x

    def count(self, part: int) -> int:
        """How many rows there are in all, of which a device has ``part``."""
        return part * (jax.lax.axis_size(self.axes) if self.axes else 1)

    def head(self, x: Float[Array, "part width"], count: int) -> Float[Array, "count width"]:
        """The first ``count`` of all rows, on every device."""
        if not self.axes:
            return x[:count]
        # Each device adds the rows that it has; the rest fall outside and are dropped.
        places = self._first(x.shape[0]) + jnp.arange(x.shape[0])
        return self.sum(jnp.zeros((count, x.shape[1]), x.dtype).at[places].add(x, mode="drop"))

    def own(self, x: Float[Array, "rows width"]) -> Float[Array, "part width"]:
        """The rows of this device, of a matrix that every device has whole."""
        if not self.axes:
            return x
        part = x.shape[0] // self.count(1)
        return jax.lax.dynamic_slice_in_dim(x, self._first(part), part)

    def _first(self, part: int) -> jax.Array:
        return jax.lax.axis_index(self.axes) * part


WHOLE = Rows()


def beside(rows: Rows, columns: Rows, q: Float[Array, "part r"]) -> tuple[Array, Rows]:
    """Gathers the rows of ``q`` (split as ``columns``) over the axes that ``rows`` has as well.

    A product of all rows with all rows of ``q`` has no place for an axis twice: the thin one moves.

    Returns:
      ``q`` with more of its rows, in another order, and how these are split.
    """
    shared = tuple(axis for axis in columns.axes if axis in rows.axes)
    if not shared:
        return q, columns
    rest = tuple(axis for axis in columns.axes if axis not in shared)
    return jax.lax.all_gather(q, shared, tiled=True), Rows(rest)
