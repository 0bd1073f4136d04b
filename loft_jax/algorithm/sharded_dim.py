"""A dimension of a matrix, whole on each device or sharded by an enclosing `jax.shard_map`.

Under `jax.jit` an array is whole whatever its sharding, and the compiler sums over devices. Inside
a `jax.shard_map` a device sees its own part alone, and a sum over the dimension must say so. That
is all the mathematics needs to know of devices: the rest is row by row, or ``r x r``.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class ShardedDim:
    """How a dimension is sharded: a static value, in pytrees a node without leaves.

    Attributes:
      axes: the manual mesh axes that shard the dimension, major to minor; none where it is whole.

    Example:
      >>> ShardedDim().sum(jnp.ones(2))
      Array([1., 1.], dtype=float32)
    """

    axes: tuple[str, ...] = ()

    def sum(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Adds the sums of all shards."""
        return jax.lax.psum(x, self.axes) if self.axes else x

    def max(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """Returns the largest value of all shards."""
        return jax.lax.pmax(x, self.axes) if self.axes else x

    def size(self, local: int) -> int:
        """Returns the size of the whole dimension, of which a device holds ``local``."""
        return local * (jax.lax.axis_size(self.axes) if self.axes else 1)

    def take_first(self, x: Float[Array, "local width"], count: int) -> Float[Array, "count width"]:
        """Returns the first ``count`` rows of the whole matrix, on every device."""
        if not self.axes:
            return x[:count]
        # Each device adds the rows that it has; indices outside of the result are dropped.
        places = self._offset(x.shape[0]) + jnp.arange(x.shape[0])
        return self.sum(jnp.zeros((count, x.shape[1]), x.dtype).at[places].add(x, mode="drop"))

    def take_local(self, x: Float[Array, "whole width"]) -> Float[Array, "local width"]:
        """Returns the rows of this device, of a matrix that every device holds whole."""
        if not self.axes:
            return x
        local = x.shape[0] // self.size(1)
        return jax.lax.dynamic_slice_in_dim(x, self._offset(local), local)

    def _offset(self, local: int) -> jax.Array:
        return jax.lax.axis_index(self.axes) * local


UNSHARDED = ShardedDim()


def gather_shared_axes(
    rows: ShardedDim, columns: ShardedDim, q: Float[Array, "local r"]
) -> tuple[Array, ShardedDim]:
    """Gathers the rows of ``q``, sharded as ``columns``, over the axes that shard ``rows`` too.

    A product of all rows with all rows of ``q`` cannot use a mesh axis twice. The thin matrix
    moves.

    Returns:
      ``q`` with more of its rows, in another order, and how the rows are now sharded.
    """
    shared = tuple(axis for axis in columns.axes if axis in rows.axes)
    if not shared:
        return q, columns
    left = tuple(axis for axis in columns.axes if axis not in shared)
    return jax.lax.all_gather(q, shared, tiled=True), ShardedDim(left)
