"""The orthonormal basis of a factor: the frame in which all of LoFT is written.

The paper keeps the moments in the coordinates of the raw factors, where every formula carries
``(V^T V)^-1`` and the moments are multiplied by ``C = (V_-^T V)(V^T V)^-1`` when the factor moves
from ``V_-`` to ``V``. Both come from a basis that is not orthonormal. With ``V = Q L^T`` and
``Q^T Q = I`` the projector is ``P_V = Q Q^T``, the calibration matrix is ``T = Q_-^T Q``, a
contraction, and nothing is ever divided by ``|V|^2``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from loft_jax._rows import WHOLE, Rows


class Basis(NamedTuple):
    """An orthonormal basis of the columns of a factor ``V`` (``n x r``), ``V = q @ inv(l_inv).T``.

    Attributes:
      q: ``(n, r)``, orthonormal columns; ``q @ q.T`` is the paper's projector ``P_V``.
      l_inv: ``(r, r)``, with ``q = V @ l_inv.T``. It maps coordinates in ``q`` back to the
        factor's own: an update ``h`` in the basis is ``h @ l_inv`` for the partner factor.
    """

    q: Float[Array, "n r"]
    l_inv: Float[Array, "r r"]


def orthonormal_basis(v: Float[Array, "n r"], rows: Rows = WHOLE) -> Basis:
    """Returns an orthonormal basis of the columns of ``v``.

    Two passes of shifted CholeskyQR, then a polynomial in the Gram matrix. It needs only ``r x r``
    reductions over the long axis, so it shards where a Householder QR would gather, and it is a
    smooth function of ``v``.

    One pass loses the directions whose squared singular value is under the rounding of the Gram
    matrix; the second recovers them. Directions that are rounding alone (a rank-deficient factor)
    come out small, and any further pass would blow them up. The polynomial instead sends each
    singular value ``s`` of ``q`` to ``s^3 (5 - 3 s^2) / 2``, twice: that leaves 1 in place to
    second order, which finishes the orthonormalisation, and sends the small ones to zero, so that
    ``l_inv`` is a generalised inverse. A zero factor has a zero basis and a zero ``l_inv``.

    Args:
      v: ``(n, r)``, floating point.
      rows: how its rows are spread.

    Returns:
      The basis, in the dtype of ``v``.

    Source: blocks 2 and 5 of the paper, in the form ``(V^T V)^-1 = l_inv.T @ l_inv``.

    Example:
      >>> import jax.numpy as jnp
      >>> v = jnp.array([[3.0, 1e-3], [4.0, 0.0], [0.0, 1e-3]])
      >>> q, l_inv = orthonormal_basis(v)
      >>> bool(jnp.allclose(q.T @ q, jnp.eye(2), atol=1e-5))
      True
      >>> bool(jnp.allclose(v @ l_inv.T, q, atol=1e-5))
      True
    """
    r = v.shape[-1]
    eye = jnp.eye(r, dtype=v.dtype)
    # Squares of tiny entries would underflow in float32, so the Gram matrix sees entries up to 1.
    largest = rows.max(jnp.max(jnp.abs(v)))
    scale = jnp.where(largest > 0, largest, 1)
    q, l_inv = v / scale, eye / scale
    for _ in range(2):
        step = _inverse_cholesky(rows.sum(q.T @ q))
        q, l_inv = q @ step.T, step @ l_inv
    gram = rows.sum(q.T @ q)
    once = gram @ (5 * eye - 3 * gram) / 2
    gram = once @ gram @ once
    polish = once @ gram @ (5 * eye - 3 * gram) / 2
    return Basis(q @ polish, polish @ l_inv)


def _inverse_cholesky(gram: Float[Array, "r r"]) -> Float[Array, "r r"]:
    """Returns ``inv(L)`` for ``L L^T = gram + shift I``, the shift being the Gram's own rounding.

    The shift is relative to the trace: scale-invariant, unlike an absolute damping, which would
    swamp a factor whose entries are of the learning rate's size.
    """
    r = gram.shape[-1]
    eye = jnp.eye(r, dtype=gram.dtype)
    trace = jnp.trace(gram)
    shift = jnp.where(trace > 0, 4 * jnp.finfo(gram.dtype).eps * trace, 1)
    lower = jnp.linalg.cholesky(gram + shift * eye)
    # Inverting the small L and multiplying keeps a sharded tall matrix where it is; a triangular
    # solve with the tall matrix as right-hand side would gather it.
    return jax.scipy.linalg.solve_triangular(lower, eye, lower=True)
