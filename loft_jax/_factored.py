"""The factored second moment: Adafactor's rank-one estimate, formed exactly in the basis.

The dense second moment ``v`` (``m x n``) of the projected gradients is estimated by
``v_ij ~ R_i C_j / total`` from its row sums ``R_i = tr P_i`` and column sums
``C_j = q_j^T S q_j``, ``S = sum_i P_i``. ``S`` is carried between bases exactly; the row sums all
shrink by the same factor. At full rank this is Adam with Adafactor's factored second moment.

State of a side: ``R`` and ``S``. They live in one array of shape ``(m, 1 + k)``: column 0 is ``R``,
the rest is the packed ``S`` laid out over the rows, ``k = ceil(t / m)``, which is 1 unless the rank
is large. So the state has the long axis of its factor and can be sharded and stored like it,
where an ``r x r`` array of its own could not be split the way a factor is.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from loft_jax._moments import AdamStep, packed_size, unpacking
from loft_jax._rows import WHOLE, Rows


class RowColumnSums(NamedTuple):
    """The factored second moment of one side.

    Attributes:
      rows: ``(m,)``, row sums ``R_i`` of the second moment.
      gram: ``(r, r)``, ``S``; the column sums are ``q_j^T S q_j`` and its trace is the total.
    """

    rows: Float[Array, " m"]
    gram: Float[Array, "r r"]


def factored_width(m: int, r: int) -> int:
    """Numbers per row of a factored state, ``1 + ceil(r (r + 1) / 2 / m)``."""
    return 1 + -(-packed_size(r) // m)


def pack_factored(sums: RowColumnSums, rows: Rows = WHOLE) -> Float[Array, "m width"]:
    """Lays the row sums and the packed Gram matrix out as one array.

    Example:
      >>> sums = RowColumnSums(jnp.array([1.0, 2.0]), jnp.array([[3.0]]))
      >>> pack_factored(sums)
      Array([[1., 3.],
             [2., 0.]], dtype=float32)
    """
    m, r = rows.count(sums.rows.shape[0]), sums.gram.shape[0]
    packed = sums.gram[np.triu_indices(r)]
    spread = jnp.pad(packed, (0, -packed.shape[0] % m)).reshape(m, -1)
    return jnp.concatenate([sums.rows[:, None], rows.own(spread)], axis=1)


def unpack_factored(state: Float[Array, "m width"], r: int, rows: Rows = WHOLE) -> RowColumnSums:
    """Inverse of `pack_factored`."""
    width = state.shape[1] - 1
    used = -(-packed_size(r) // width)
    packed = rows.head(state[:, 1:], used).reshape(-1)[: packed_size(r)]
    return RowColumnSums(state[:, 0], packed[unpacking(r)])


def transport_factored(
    state: Float[Array, "m width"], transport: Float[Array, "r r"], rows: Rows = WHOLE
) -> Float[Array, "m width"]:
    """Carries the sums into a new basis: ``S -> T^T S T``, the rows by the ratio of the traces."""
    of_rows, gram = unpack_factored(state, transport.shape[0], rows)
    carried = transport.T @ gram @ transport
    total = jnp.trace(gram)
    kept = jnp.trace(carried) / jnp.where(total > 0, total, 1)
    return pack_factored(RowColumnSums(of_rows * kept, carried), rows)


def accumulate_factored(
    state: Float[Array, "m width"],
    h: Float[Array, "m r"],
    b2: float | jax.Array,
    rows: Rows = WHOLE,
) -> Float[Array, "m width"]:
    """Adds a gradient to transported sums: ``h^T h`` to ``S``, its row sums of squares to ``R``."""
    of_rows, gram = unpack_factored(state, h.shape[1], rows)
    of_rows = b2 * of_rows + (1 - b2) * jnp.sum(h * h, axis=1)
    gram = b2 * gram + (1 - b2) * rows.sum(h.T @ h)
    return pack_factored(RowColumnSums(of_rows, gram), rows)


def factored_adam_direction(
    mu: Float[Array, "m r"],
    state: Float[Array, "m width"],
    q: Float[Array, "n r"],
    step: AdamStep,
    rows: Rows = WHOLE,
    columns: Rows = WHOLE,
) -> Float[Array, "m r"]:
    """Returns ``D @ q`` for the Adam direction with the factored second moment.

    With the root mean squares ``a_i`` of row ``i``, ``c_j`` of column ``j`` and ``t`` of the whole
    bias-corrected second moment, ``sqrt(v_ij)`` is ``a_i c_j / t``, and with epsilon
    ``(a_i + eps)(c_j + eps) / (t + eps)``: exactly ``sqrt(v) + eps`` where ``v`` is uniform, and
    still a product, so that ``D @ q`` costs ``O((m + n) r^2)`` and nothing ``m x n`` is formed.

    Sums under rounding relative to their mean are raised to it. ``rows`` and ``columns`` say how
    the rows of ``mu`` and of ``q`` are spread.

    Example:
      >>> from loft_jax._moments import adam_step
      >>> q, h = jnp.eye(2), jnp.array([[3.0, -3.0]])
      >>> state = accumulate_factored(jnp.zeros((1, 4)), h, 0.0)
      >>> step = adam_step(jnp.array(1), 0.0, 0.0, 0.0, jnp.float32)
      >>> factored_adam_direction(h, state, q, step)
      Array([[ 1., -1.]], dtype=float32)
    """
    m, n = rows.count(mu.shape[0]), columns.count(q.shape[0])
    row_sums, gram = unpack_factored(state / step.correction2, q.shape[1], rows)
    column_sums = jnp.sum((q @ gram) * q, axis=1)
    of_row = jnp.sqrt(_raise_to_rounding(row_sums, rows) / n) + step.eps
    of_column = jnp.sqrt(_raise_to_rounding(column_sums, columns) / m) + step.eps
    of_all = jnp.sqrt(jnp.maximum(jnp.trace(gram), 0) / (m * n)) + step.eps
    weighted = columns.sum((q / jnp.where(of_column > 0, of_column, 1)[:, None]).T @ q)
    # Squares that overflow stop the step, as they stop Adam's.
    of_all = jnp.where(jnp.isinf(of_all), 0, of_all)
    scale = of_all / step.correction1 / jnp.where(of_row > 0, of_row, 1)
    return scale[:, None] * (mu @ weighted)


def _raise_to_rounding(sums: Float[Array, " k"], rows: Rows) -> Float[Array, " k"]:
    mean = rows.sum(jnp.sum(sums)) / rows.count(sums.shape[0])
    return jnp.maximum(sums, jnp.finfo(sums.dtype).eps * mean)
