"""Adam's ratio taken entry by entry in the frame of a factor, without rebuilding the full update.

This is LoFT (simple) and, in the raw frame, the ablation of block 5. What it does depends on the
frame, as LoRA's own Adam depends on how ``W`` is factored: the squares of coordinates are not
carried from one frame to another by anything less than their cross terms.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from loft_jax._factored import unpack_factored
from loft_jax._moments import AdamStep
from loft_jax._rows import WHOLE, Rows


def entrywise_direction(
    mu: Float[Array, "*shape"], nu: Float[Array, "*shape"], step: AdamStep
) -> Float[Array, "*shape"]:
    """Returns Adam's direction ``mu_hat / (sqrt(nu_hat) + eps)``, 0 where both are 0.

    Example:
      >>> from loft_jax._moments import adam_step
      >>> step = adam_step(jnp.array(1), 0.9, 0.999, 0.0, jnp.float32)
      >>> h = jnp.array([[3.0, 0.0, -4.0]])
      >>> entrywise_direction(0.1 * h, 0.001 * h**2, step).round(5)
      Array([[ 1.,  0., -1.]], dtype=float32)
    """
    # Cancellation in transported cross terms can leave a second moment slightly negative.
    denominator = jnp.sqrt(jnp.maximum(nu / step.correction2, 0)) + step.eps
    return mu / step.correction1 / jnp.where(denominator > 0, denominator, 1)


def diagonal_of_cross_terms(cross: Float[Array, "m t"], r: int) -> Float[Array, "m r"]:
    """Returns the diagonals of packed symmetric matrices.

    Example:
      >>> diagonal_of_cross_terms(jnp.array([[4.0, 6.0, 9.0]]), 2)
      Array([[4., 9.]], dtype=float32)
    """
    row, col = np.triu_indices(r)
    return cross[:, row == col]


def diagonal_of_factored(
    state: Float[Array, "m width"], r: int, rows: Rows = WHOLE
) -> Float[Array, "m r"]:
    """Returns the rank-one estimate ``R_i S_ll / tr S`` of each coordinate's second moment."""
    of_rows, gram = unpack_factored(state, r, rows)
    total = jnp.trace(gram)
    return of_rows[:, None] * jnp.diagonal(gram)[None, :] / jnp.where(total > 0, total, 1)
