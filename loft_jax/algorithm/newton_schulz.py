"""Newton-Schulz orthogonalization of a moment, in the orthonormal basis of the partner factor.

The full moment is ``M Q^T`` with orthonormal ``Q``. Every iterate of the dense iteration is then
``X Q^T`` with the iterate ``X`` of the iteration on ``M`` alone, and the norms that start it are
equal. So the low-rank form (Algorithm 4) is the dense form (Algorithm 3) on an ``m x r`` matrix.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from loft_jax.algorithm.adam import as_scalar
from loft_jax.algorithm.sharded_dim import UNSHARDED, ShardedDim

Coefficients = tuple[float | jax.Array, float | jax.Array, float | jax.Array]


def newton_schulz(
    x: Float[Array, "m r"],
    steps: int | jax.Array,
    coeffs: Coefficients,
    eps: float | jax.Array,
    dim: ShardedDim = UNSHARDED,
) -> Float[Array, "m r"]:
    """Returns the matrix with its singular values driven towards 1.

    Each step maps a singular value ``s`` to ``a s + b s^3 + c s^5``, after a division by
    ``|x|_F + eps``. A zero matrix stays zero.

    Args:
      x: the matrix.
      steps: how many iterations.
      coeffs: ``(a, b, c)``.
      eps: added to the norm.
      dim: how the rows are sharded.

    Source: Algorithm 3 of Tastan et al., ICLR 2026, after Jordan et al., "Muon", 2024.

    Example:
      >>> x = jnp.array([[3.0, 0.0], [0.0, 0.4]])
      >>> jnp.diagonal(newton_schulz(x, 20, (1.5, -0.5, 0.0), 0.0)).round(3)
      Array([1., 1.], dtype=float32)
    """
    a, b, c, eps = (as_scalar(number, x.dtype) for number in (*coeffs, eps))
    steps = steps if isinstance(steps, int) else jnp.asarray(steps).astype(jnp.int32)
    # The norm of entries up to 1: squares of tiny ones would underflow in float32.
    largest = dim.max(jnp.max(jnp.abs(x)))
    size = jnp.where(largest > 0, largest, 1)
    norm = size * jnp.sqrt(dim.sum(jnp.sum((x / size) ** 2))) + eps
    x = x / jnp.where(norm > 0, norm, 1)

    def iterate(_, x):
        # The Gram matrix of the short dimension: factors with m > r multiply r x r matrices only.
        # Sharded rows are always summed over, however few they are.
        if x.shape[0] < x.shape[1] and dim == UNSHARDED:
            gram = x @ x.T
            return a * x + (b * gram + c * gram @ gram) @ x
        gram = dim.sum(x.T @ x)
        return a * x + x @ (b * gram + c * gram @ gram)

    return jax.lax.fori_loop(0, steps, iterate, x)
