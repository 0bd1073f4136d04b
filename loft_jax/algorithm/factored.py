"""The factored second moment: Adafactor's rank-one estimate, formed exactly in the basis.

The dense second moment ``v`` (``m x n``) of the projected gradients is estimated by
``v_ij ~ R_i C_j / total`` from its row sums ``R_i = tr P_i`` and column sums ``C_j = q_j^T S q_j``,
``S = sum_i P_i``. ``S`` is calibrated exactly; the row sums all shrink by the same factor. At full
rank this is Adam with Adafactor's factored second moment.

The state holds ``R`` and ``S`` in one array of shape ``(m, 1 + k)``: column 0 is ``R``, the rest is
the packed ``S`` laid out over the rows, ``k = ceil(t / m)``, which is 1 unless the rank is large.
So the state has the long axis of its factor and can be sharded and stored like it. An ``r x r``
array of its own could not be sharded as a factor is.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from loft_jax.algorithm.adam import AdamScalars, root
from loft_jax.algorithm.basis import Basis, project, unseen
from loft_jax.algorithm.cross_terms import packed, packed_size, unpacking
from loft_jax.algorithm.sharded_dim import UNSHARDED, ShardedDim


class RowColumnSums(NamedTuple):
    """The factored second moment of one factor.

    Attributes:
      rows: ``(m,)``, row sums ``R_i`` of the second moment.
      gram: ``(r, r)``, ``S``; the column sums are ``q_j^T S q_j`` and its trace is the total.
    """

    rows: Float[Array, " m"]
    gram: Float[Array, "r r"]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Factored:
    """Keeps row sums and a Gram matrix, ``m x (1 + ceil(r (r + 1) / 2 / m))``.

    See `SecondMoment` for what each method takes and returns.
    """

    def width(self, m: int, r: int) -> int:
        return 1 + -(-packed_size(r) // m)

    def peak_elements(self, m: int, n: int, r: int) -> int:
        return 0

    def advance(
        self,
        nu: Float[Array, "m width"],
        h: Float[Array, "m r"],
        calibration: Float[Array, "r r"] | None,
        basis_changed: Bool[Array, ""] | None,
        b2: float | jax.Array,
        dim: ShardedDim,
    ) -> Float[Array, "m width"]:
        """Block 4 in sums: ``S <- b2 T^T S T + (1 - b2) h^T h``; ``R`` by the ratio of traces."""
        rows, gram = unpack(nu, h.shape[1], dim)
        if calibration is not None:
            carried = calibration.T @ gram @ calibration
            total = jnp.trace(gram)
            rows, gram = rows * (jnp.trace(carried) / jnp.where(total > 0, total, 1)), carried
        rows = b2 * rows + (1 - b2) * jnp.sum(h * h, axis=1)
        gram = b2 * gram + (1 - b2) * dim.sum(h.T @ h)
        return pack(RowColumnSums(rows, gram), dim)

    def carry(
        self,
        nu: Float[Array, "m width"],
        calibration: Float[Array, "r k"],
        known: Float[Array, ""],
        dim: ShardedDim,
    ) -> Float[Array, "m new_width"]:
        """``S <- T^T S T + (tr S / known) (I - T^T T)``; ``R`` by the ratio of traces."""
        r = calibration.shape[0]
        rows, gram = unpack(nu, r, dim)
        total = jnp.trace(gram)
        carried = calibration.T @ gram @ calibration + total / known * unseen(calibration)
        rows = rows * (jnp.trace(carried) / jnp.where(total > 0, total, 1))
        return pack(RowColumnSums(rows, carried), dim)

    def direction(
        self,
        m_hat: Float[Array, "m r"],
        nu: Float[Array, "m width"],
        basis: Basis,
        scalars: AdamScalars,
        dim: ShardedDim,
        batch_size: int,
    ) -> Float[Array, "m r"]:
        """Block 5 with ``v_ij = R_i C_j / total``: ``D P_V`` at a cost of ``O((m + n) r^2)``.

        With the root mean squares ``a_i`` of row ``i``, ``c_j`` of column ``j`` and ``t`` of the
        whole second moment, ``sqrt(v_ij)`` is ``a_i c_j / t``, and with epsilon
        ``(a_i + eps)(c_j + eps) / (t + eps)``: exactly ``sqrt(v) + eps`` where ``v`` is uniform,
        and still a product, so that nothing ``m x n`` is formed. ``eps_root`` is added to the mean
        squares. Sums below rounding relative to their mean are raised to it.
        """
        q, columns = basis.matrix, basis.dim
        m, n = dim.size(m_hat.shape[0]), columns.size(q.shape[0])
        row_sums, gram = unpack(nu / scalars.correction2, q.shape[1], dim)
        column_sums = jnp.sum((q @ gram) * q, axis=1)
        of_row = root(_raise_to_rounding(row_sums, dim) / n, scalars)
        of_column = root(_raise_to_rounding(column_sums, columns) / m, scalars)
        of_all = root(jnp.maximum(jnp.trace(gram), 0) / (m * n), scalars)
        weighted = columns.sum((q / jnp.where(of_column > 0, of_column, 1)[:, None]).T @ q)
        scale = of_all / jnp.where(of_row > 0, of_row, 1)
        return project(scale[:, None] * (m_hat @ weighted), basis)

    def diagonal(self, nu: Float[Array, "m width"], r: int, dim: ShardedDim) -> Float[Array, "m r"]:
        """The rank-one estimate ``R_i S_ll / tr S`` of each coordinate's second moment."""
        rows, gram = unpack(nu, r, dim)
        total = jnp.trace(gram)
        return rows[:, None] * jnp.diagonal(gram)[None, :] / jnp.where(total > 0, total, 1)

    def entrywise_bound(self, scalars: AdamScalars) -> jax.Array:
        return 10 * scalars.limit


def pack(sums: RowColumnSums, dim: ShardedDim = UNSHARDED) -> Float[Array, "m width"]:
    """Lays the row sums and the packed Gram matrix out as one array.

    Example:
      >>> pack(RowColumnSums(jnp.array([1.0, 2.0]), jnp.array([[3.0]])))
      Array([[1., 3.],
             [2., 0.]], dtype=float32)
    """
    m = dim.size(sums.rows.shape[0])
    entries = packed(sums.gram)
    spread = jnp.pad(entries, (0, -len(entries) % m)).reshape(m, -1)
    return jnp.concatenate([sums.rows[:, None], dim.take_local(spread)], axis=1)


def unpack(nu: Float[Array, "m width"], r: int, dim: ShardedDim = UNSHARDED) -> RowColumnSums:
    """Inverse of `pack`."""
    width = nu.shape[1] - 1
    used = -(-packed_size(r) // width)
    entries = dim.take_first(nu[:, 1:], used).reshape(-1)[: packed_size(r)]
    return RowColumnSums(nu[:, 0], entries[unpacking(r)])


def _raise_to_rounding(sums: Float[Array, " k"], dim: ShardedDim) -> Float[Array, " k"]:
    mean = dim.sum(jnp.sum(sums)) / dim.size(sums.shape[0])
    return jnp.maximum(sums, jnp.finfo(sums.dtype).eps * mean)
