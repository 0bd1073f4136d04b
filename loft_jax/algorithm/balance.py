"""Balanced factors: the factorization of ``U V^T`` that is best to compute with.

LoFT depends on ``U V^T`` alone, so ``(U X, V X^-T)`` serves as well as ``(U, V)`` for any
invertible ``X``. It matters to rounding. Where columns of a factor are nearly parallel, or huge
ones meet tiny ones, numbers have to cancel. A forward pass in bfloat16 then loses the adapter, so
does a cast for serving, and the gradients are rounding alone in some directions. Balanced factors
are the singular vectors of the product, each times the root of its singular value: the columns of a
factor are orthogonal, and those of both factors equally long.

Everything here is ``r x r``.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from loft_jax.algorithm.jacobi import symmetric_eigen
from loft_jax.algorithm.pair import FactorPair

# The sum of squared cosines between a column and the others. While those of both factors are below
# it, rounding each entry costs the product at most 1.4 times what it costs balanced factors.
_CORRELATION = 0.5
# |U|^2 |V|^2 may be this many times r |U V^T|^2; balanced, it is at most r |U V^T|^2.
_EXCESS = 8.0
# A factor may be this many times as long as the other. The gradients of a short factor are large,
# and overflow in float16.
_UNEVEN = 32.0
# A factor becomes at most so many times shorter in one step. Updates are added, so that the new
# factor has the rounding of the old one. The next steps shorten it further where it needs more.
_SHORTER = 256.0
# A singular value below this part of the largest gives one factor the root of this part. So a
# direction of one factor that the other does not have yet stays alive.
_FLOOR = 1e-3

Grams = FactorPair[Float[Array, "r r"]]


def is_unbalanced(grams: Grams) -> Bool[Array, ""]:
    """Returns whether a factor has nearly dependent columns, or is too long.

    Too long for the product, or in comparison with the other factor.

    Args:
      grams: ``U^T U`` and ``V^T V``.

    Example:
      >>> balanced = FactorPair(jnp.eye(2), jnp.diag(jnp.array([1.0, 1e-3])))
      >>> bool(is_unbalanced(balanced))
      False
      >>> nearly_opposite = jnp.array([[1.0, -0.99], [-0.99, 1.0]])
      >>> bool(is_unbalanced(FactorPair(jnp.eye(2), nearly_opposite)))
      True
      >>> bool(is_unbalanced(FactorPair(jnp.eye(2), 1e-4 * jnp.eye(2))))
      True
    """
    a, b = _of_unit_trace(grams.a), _of_unit_trace(grams.b)
    correlation = jnp.maximum(_correlation(a), _correlation(b))
    excess = 1 / (_EXCESS * a.shape[-1]) > jnp.sum(a * b)
    lengths = jnp.trace(grams.a), jnp.trace(grams.b)
    uneven = jnp.maximum(*lengths) > _UNEVEN**2 * jnp.minimum(*lengths)
    # A product without a column has nothing to balance. Infinite factors are left as they are.
    columns = jnp.sum(jnp.diagonal(a) * jnp.diagonal(b))
    found = (correlation > _CORRELATION) | excess | uneven
    return found & (columns > 0) & jnp.isfinite(columns)


def balancing_matrices(grams: Grams) -> FactorPair[Float[Array, "r r"]]:
    """Returns ``X`` and ``X^-T``, with which ``U X`` and ``V X^-T`` are balanced.

    With ``A = U^T U = Z D Z^T`` and ``B = V^T V``, the matrix ``D^1/2 Z^T B Z D^1/2 = W S^2 W^T``
    has the squared singular values of ``U V^T``, and ``X = Z D^-1/2 W S^1/2``. The product of the
    two is the identity to rounding, whatever the errors of the eigenvectors, so that ``U V^T``
    keeps its value. A factor becomes at most 256 times shorter. Where the matrices do not exist in
    the precision at hand, both are the identity.

    Args:
      grams: ``A`` and ``B``.
    """
    a, b = _of_unit_trace(grams.a), _of_unit_trace(grams.b)
    eye, eps = jnp.eye(a.shape[-1], dtype=a.dtype), jnp.finfo(a.dtype).eps
    values, z = symmetric_eigen(a)
    root = z * jnp.sqrt(jnp.maximum(values, 0) + max(_FLOOR**2, eps))
    inverse = z / jnp.sqrt(jnp.maximum(values, 0) + max(_FLOOR**2, eps))
    squares, w = symmetric_eigen(root.T @ b @ root)
    singular = jnp.sqrt(jnp.maximum(squares, 0))
    singular = jnp.maximum(singular, _FLOOR * jnp.max(singular))
    x = inverse @ (w * jnp.sqrt(singular))
    x_inverse_t = root @ (w / jnp.sqrt(jnp.where(singular > 0, singular, 1)))
    found = jnp.all(jnp.isfinite(x) & jnp.isfinite(x_inverse_t)) & (jnp.max(singular) > 0)
    size = (jnp.trace(grams.b) / jnp.trace(grams.a)) ** 0.25
    size = jnp.clip(size, 1 / _SHORTER, _SHORTER)
    keep = lambda matrix: jnp.where(found, matrix, eye)
    return FactorPair(keep(x * size), keep(x_inverse_t / size))


def _of_unit_trace(gram: Float[Array, "r r"]) -> Float[Array, "r r"]:
    trace = jnp.trace(gram)
    return gram / jnp.where(trace > 0, trace, 1)


def _correlation(gram: Float[Array, "r r"]) -> Float[Array, ""]:
    """Returns the largest sum of squared cosines between a column and all others."""
    lengths = jnp.sqrt(jnp.diagonal(gram))
    cosines = gram / jnp.where(lengths > 0, lengths, 1)[:, None]
    cosines = cosines / jnp.where(lengths > 0, lengths, 1)
    return jnp.max(jnp.sum(cosines**2, axis=0)) - 1
