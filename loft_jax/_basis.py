"""The orthonormal basis of a factor: the frame in which all of LoFT is written.

The paper keeps the moments in the coordinates of the raw factors, where every formula carries
``(V^T V)^-1`` and the moments are multiplied by ``C = (V_-^T V)(V^T V)^-1`` when the factor moves
from ``V_-`` to ``V``. Both come from a basis that is not orthonormal. With ``V = Q L^T`` and
``Q^T Q = I`` the projector is ``P_V = Q Q^T``, the calibration matrix is ``T = Q_-^T Q``, a
contraction, and nothing is ever divided by ``|V|^2``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from loft_jax._jointly import jointly
from loft_jax._platform import platform
from loft_jax._rows import WHOLE, Rows

# Rows that are eliminated one by one before the rest follows by a product: as many as keep the loop
# short at small ranks, and the program at large ones.
_PANEL = 16


class Basis(NamedTuple):
    """An orthonormal basis of the columns of a factor ``V`` (``n x r``), ``V = q @ inv(l_inv).T``.

    Attributes:
      q: ``(n, r)``, orthonormal columns; ``q @ q.T`` is the paper's projector ``P_V``.
      l_inv: ``(r, r)``, with ``q = V @ l_inv.T``. It maps coordinates in ``q`` back to the
        factor's own: an update ``h`` in the basis is ``h @ l_inv`` for the partner factor.
    """

    q: Float[Array, "n r"]
    l_inv: Float[Array, "r r"]


def orthonormal_bases(factors: Sequence[Array], rows: Sequence[Rows]) -> list[Basis]:
    """Returns orthonormal bases of the columns of factors, `orthonormal_basis` of each.

    What is ``r x r`` is done for all of them at once: two Cholesky factorizations in a program,
    however many kinds of factors it has, where each kind of its own would have two.

    Args:
      factors: each ``(*batch, n, r)``, floating point; the batch axes enumerate factors.
      rows: how the rows of each are spread.

    Returns:
      For each its basis, of the same batch axes, in its dtype.
    """
    # Squares of tiny entries would underflow in float32, so the Gram matrix sees entries up to 1.
    scales, thin = [], []
    for v, part in zip(factors, rows, strict=True):
        largest = part.max(jnp.max(jnp.abs(v), axis=(-2, -1), keepdims=True))
        scales.append(jnp.where(largest > 0, largest, 1))
        thin.append(v / scales[-1])
    grams = lambda: [
        part.sum(jnp.swapaxes(q, -1, -2) @ q) for q, part in zip(thin, rows, strict=True)
    ]
    passes = []
    for _ in range(2):
        steps = jointly(_inverse_cholesky, grams())
        thin = [q @ jnp.swapaxes(step, -1, -2) for q, step in zip(thin, steps, strict=True)]
        passes.append(steps)
    polished = jointly(_polish, grams(), *passes, scales)
    return [Basis(q @ polish, l_inv) for q, (polish, l_inv) in zip(thin, polished, strict=True)]


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
    return orthonormal_bases([v], [rows])[0]


def _polish(
    gram: Float[Array, "r r"],
    first: Float[Array, "r r"],
    second: Float[Array, "r r"],
    scale: Float[Array, "1 1"],
) -> tuple[Float[Array, "r r"], Float[Array, "r r"]]:
    """Returns the polynomial in the last Gram matrix, and with it all of ``l_inv``."""
    eye = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    once = gram @ (5 * eye - 3 * gram) / 2
    gram = once @ gram @ once
    polish = once @ gram @ (5 * eye - 3 * gram) / 2
    return polish, polish @ (second @ (first / scale))


def _inverse_cholesky(gram: Float[Array, "r r"]) -> Float[Array, "r r"]:
    """Returns ``inv(L)`` for ``L L^T = gram + shift I``, the shift being the Gram's own rounding.

    The shift is relative to the trace: scale-invariant, unlike an absolute damping, which would
    swamp a factor whose entries are of the learning rate's size.
    """
    r = gram.shape[-1]
    eye = jnp.eye(r, dtype=gram.dtype)
    trace = jnp.trace(gram)
    shift = jnp.where(trace > 0, 4 * jnp.finfo(gram.dtype).eps * trace, 1)
    if platform() == "cpu":
        return _eliminated(gram + shift * eye)
    # Inverting the small L and multiplying keeps a sharded tall matrix where it is; a triangular
    # solve with the tall matrix as right-hand side would gather it.
    lower = jnp.linalg.cholesky(gram + shift * eye)
    return jax.scipy.linalg.solve_triangular(lower, eye, lower=True)


def _eliminated(gram: Float[Array, "r r"]) -> Float[Array, "r r"]:
    """Returns ``inv(L)`` for ``L L^T = gram`` by eliminating ``[gram, I]`` to ``[L^T, inv(L)]``.

    In place of LAPACK's two calls on CPUs. Those need nothing but the parameters, so they start
    beside the forward pass of the model, and in profiles of a training step held one of XLA's
    threads for most of it (docs/cost.md).

    Example:
      >>> print(_eliminated(jnp.array([[4.0, 2.0], [2.0, 2.0]])))
      [[ 0.5  0. ]
       [-0.5  1. ]]
    """
    r = gram.shape[-1]
    rest, done = jnp.concatenate([gram, jnp.eye(r, dtype=gram.dtype)], axis=1), []
    # A few rows at a time, each from those above it; what lies below follows by one product.
    for begin in range(0, r, _PANEL):
        left = r - begin
        height = min(_PANEL, left)
        at = np.arange(height)

        def eliminate(j: int | jax.Array, panel: jax.Array, at: np.ndarray = at) -> jax.Array:
            row = panel[j] / jnp.sqrt(panel[j, j])
            below = jnp.where(at > j, row[: len(at)], 0)
            return jnp.where((at == j)[:, None], row, panel - below[:, None] * row)

        panel = jax.lax.fori_loop(0, height, eliminate, rest[:height])
        done.append(panel[:, left:])
        rest = rest[height:, height:] - panel[:, height:left].T @ panel[:, height:]
    return jnp.concatenate(done)
