"""The orthonormal basis of a factor, in which all of LoFT is written.

The paper keeps the moments in the coordinates of the raw factors. There every formula carries
``(V^T V)^-1``, and the moments are multiplied by ``C = (V_-^T V)(V^T V)^-1`` when the factor moves
from ``V_-`` to ``V``. Both disappear in an orthonormal basis. With ``V = Q L^T`` and ``Q^T Q = I``
the projector is ``P_V = Q Q^T``, the calibration matrix is ``T = Q_-^T Q``, a contraction, and
nothing is ever divided by ``|V|^2``.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from loft_jax.algorithm.jacobi import symmetric_eigen
from loft_jax.algorithm.platform import by_platform
from loft_jax.algorithm.sharded_dim import UNSHARDED, ShardedDim

# Rows that the elimination takes one by one before a product updates the rest: enough to keep the
# loop short at small ranks, and the program short at large ones.
_PANEL = 16


class Basis(NamedTuple):
    """A basis of the columns of ``s V``: a factor ``V`` (``n x r``) times the adapter's scale.

    Attributes:
      q: ``(n, r)``, orthonormal columns; ``q @ q.T`` is the paper's projector ``P_V``. None where
        only the ``r x r`` part of a basis is passed on.
      l_inv: ``(r, r)``, with ``q = s V @ l_inv.T``. It maps coordinates in ``q`` back to the
        factor's own: a step ``h`` in the basis is the step ``h @ l_inv`` of the partner factor.
      raw: ``(n, r)``, ``s V`` itself where an ablation keeps the moments in the coordinates of the
        raw factor; None in the method. Inverses are taken through ``q`` in either case.
      dim: how the dimension ``n`` is sharded.
    """

    q: Float[Array, "*batch n r"] | None
    l_inv: Float[Array, "*batch r r"]
    raw: Float[Array, "*batch n r"] | None = None
    dim: ShardedDim = UNSHARDED

    @property
    def matrix(self) -> Float[Array, "*batch n r"]:
        """The basis matrix in which the partner's moments are expressed."""
        matrix = self.q if self.raw is None else self.raw
        assert matrix is not None
        return matrix


def _each(fn: Callable[..., Any], *arguments: Sequence[Array]) -> list[Any]:
    return [fn(*matrices) for matrices in zip(*arguments, strict=True)]


def orthonormal_bases(
    factors: Sequence[Float[Array, "..."]],
    scales: Sequence[float],
    dims: Sequence[ShardedDim],
    *,
    keep_raw: bool = False,
    precision: float = 0.0,
    map_small: Callable[..., list[Any]] = _each,
) -> list[Basis]:
    """Returns the basis of each factor, see `orthonormal_basis`.

    Args:
      factors: each ``(*batch, n, r)``, floating point.
      scales: of each adapter.
      dims: how the dimension ``n`` of each is sharded.
      keep_raw: whether to keep the scaled factor as the basis matrix (ablations).
      precision: singular values of a factor below this part of its largest count as zero.
      map_small: maps a function of ``r x r`` matrices over those of all factors. By default one
        after another; `execution.batching` computes them as one batch.
    """
    # Squares of tiny entries would underflow in float32: the Gram matrix sees entries up to 1.
    sizes, thin = [], []
    for v, dim in zip(factors, dims, strict=True):
        largest = dim.max(jnp.max(jnp.abs(v), axis=(-2, -1), keepdims=True))
        sizes.append(jnp.where(largest > 0, largest, 1))
        thin.append(v / sizes[-1])
    grams = lambda: [
        dim.sum(jnp.swapaxes(q, -1, -2) @ q) for q, dim in zip(thin, dims, strict=True)
    ]
    trusted = None
    if precision > 0:
        trusted = map_small(functools.partial(trusted_directions, precision=precision), grams())
        thin = [q @ projector for q, projector in zip(thin, trusted, strict=True)]
    passes = []
    for _ in range(2):
        passes.append(map_small(_inverse_cholesky, grams()))
        thin = [q @ jnp.swapaxes(step, -1, -2) for q, step in zip(thin, passes[-1], strict=True)]
    polished = map_small(_polish, grams(), *passes, sizes)
    if trusted is not None:
        polished = [
            (polish, l_inv @ x) for (polish, l_inv), x in zip(polished, trusted, strict=True)
        ]
    bases = []
    for v, q, (polish, l_inv), scale, dim in zip(
        factors, thin, polished, scales, dims, strict=True
    ):
        raw = scale * v if keep_raw else None
        bases.append(Basis(q @ polish, l_inv / scale, raw, dim))
    return bases


def orthonormal_basis(
    v: Float[Array, "n r"],
    scale: float = 1.0,
    dim: ShardedDim = UNSHARDED,
    *,
    keep_raw: bool = False,
    precision: float = 0.0,
) -> Basis:
    """Returns an orthonormal basis of the columns of ``scale * v``.

    Two passes of shifted CholeskyQR, then a polynomial in the Gram matrix. It needs only ``r x r``
    reductions over the long axis, so it shards where a Householder QR would gather, and it is a
    smooth function of ``v``.

    One pass loses the directions whose squared singular value is below the rounding of the Gram
    matrix; the second pass recovers them. Directions that are only rounding (a rank-deficient
    factor) come out small, and a further pass would amplify them. The polynomial instead sends each
    singular value ``s`` of ``q`` to ``s^3 (5 - 3 s^2) / 2``, twice. That leaves 1 in place to
    second order, which finishes the orthonormalization, and sends the small ones to zero, so that
    ``l_inv`` is a generalized inverse. A zero factor has a zero basis and a zero ``l_inv``.

    Args:
      v: ``(n, r)``, floating point.
      scale: of the adapter.
      dim: how the dimension ``n`` is sharded.
      keep_raw: whether to keep ``scale * v`` as the basis matrix (ablations).
      precision: singular values below this part of the largest count as zero, see
        `trusted_directions`.

    Returns:
      The basis, in the dtype of ``v``.

    Source: blocks 2 and 5 of the paper, in the form ``(V^T V)^-1 = l_inv.T @ l_inv``.

    Example:
      >>> import jax.numpy as jnp
      >>> v = jnp.array([[3.0, 1e-3], [4.0, 0.0], [0.0, 1e-3]])
      >>> basis = orthonormal_basis(v)
      >>> bool(jnp.allclose(basis.q.T @ basis.q, jnp.eye(2), atol=1e-5))
      True
      >>> bool(jnp.allclose(v @ basis.l_inv.T, basis.q, atol=1e-5))
      True
    """
    return orthonormal_bases([v], [scale], [dim], keep_raw=keep_raw, precision=precision)[0]


def trusted_directions(gram: Float[Array, "r r"], precision: float) -> Float[Array, "r r"]:
    """Returns the projector on the directions of a factor that are more than rounding.

    A factor is a sum of gradients, times ``r x r`` matrices. Where these were computed in bfloat16,
    singular values below 2^-8 of the largest may consist of their rounding alone. The partner's
    gradient in such a direction is rounding too, and its step is divided by the singular value.

    Args:
      gram: ``V^T V``.
      precision: the part of the largest singular value of ``V`` below which others count as zero.

    Example:
      >>> gram = jnp.diag(jnp.array([1.0, 1e-4, 1e-6]))  # singular values 1, 1e-2 and 1e-3
      >>> jnp.diagonal(trusted_directions(gram, 2.0**-8)).tolist()
      [1.0, 1.0, 0.0]
    """
    trace = jnp.trace(gram)
    squares, vectors = symmetric_eigen(gram / jnp.where(trace > 0, trace, 1))
    trusted = squares >= precision**2 * jnp.max(squares)
    eye = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    # Where all are, nothing is rounded.
    return jnp.where(trusted.all(), eye, (vectors * trusted) @ vectors.T)


def scale_gradient(gradient: Float[Array, "m r"], basis: Basis) -> Float[Array, "m r"]:
    """Returns ``h`` with ``G P_V = h F^T`` from a factor's gradient ``s G V`` (block 2, eq. 5).

    ``F`` is the basis matrix of the partner. In the orthonormal basis the Frobenius norm of ``h``
    is that of the projected full gradient (block 6).

    Example:
      >>> full = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> v = jnp.array([[0.0], [2.0]])
      >>> scale_gradient(full @ v, orthonormal_basis(v))
      Array([[2.],
             [4.]], dtype=float32)
      >>> scale_gradient(full @ v, orthonormal_basis(v, keep_raw=True))
      Array([[1.],
             [2.]], dtype=float32)
    """
    return _to_basis_matrix(gradient @ basis.l_inv.T, basis)


def calibration_matrix(previous: Float[Array, "n r"], basis: Basis) -> Float[Array, "r k"]:
    """Returns ``T``: ``h T`` expresses the projection of ``h F_-^T`` in the new basis (block 3).

    ``T = Q_-^T Q`` in the orthonormal basis; the paper's ``C`` of eq. (7) in the raw one. The new
    basis has another rank ``k`` after a change of rank.
    """
    assert basis.q is not None
    return _to_basis_matrix(basis.dim.sum(previous.T @ basis.q), basis)


def unseen(calibration: Float[Array, "r k"]) -> Float[Array, "k k"]:
    """Returns ``I - T^T T``: the part of the new basis outside of the old span."""
    return jnp.eye(calibration.shape[1], dtype=calibration.dtype) - calibration.T @ calibration


def project(rebuilt: Float[Array, "m r"], basis: Basis) -> Float[Array, "m r"]:
    """Returns the coordinates of ``D P_V`` from ``D F`` (block 5)."""
    return rebuilt if basis.raw is None else scale_gradient(rebuilt, basis)


def to_factor(h: Float[Array, "m r"], basis: Basis) -> Float[Array, "m r"]:
    """Returns the step of the partner factor that moves the weight by ``h F^T``."""
    return h @ basis.l_inv if basis.raw is None else h


def _to_basis_matrix(h: Float[Array, "m r"], basis: Basis) -> Float[Array, "m r"]:
    """Takes coordinates in ``Q`` to coordinates in the basis matrix."""
    return h if basis.raw is None else h @ basis.l_inv


def _polish(
    gram: Float[Array, "r r"],
    first: Float[Array, "r r"],
    second: Float[Array, "r r"],
    size: Float[Array, "1 1"],
) -> tuple[Float[Array, "r r"], Float[Array, "r r"]]:
    """Returns the polynomial in the last Gram matrix, and the complete ``l_inv``."""
    eye = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    once = gram @ (5 * eye - 3 * gram) / 2
    gram = once @ gram @ once
    polish = once @ gram @ (5 * eye - 3 * gram) / 2
    return polish, polish @ (second @ (first / size))


def _inverse_cholesky(gram: Float[Array, "r r"]) -> Float[Array, "r r"]:
    """Returns ``inv(L)`` for ``L L^T = gram + shift I``; the shift is the Gram's own rounding.

    The shift is relative to the trace, hence scale-invariant. An absolute damping would swamp a
    factor whose entries are of the learning rate's size.
    """
    eye = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    trace = jnp.trace(gram)
    shift = jnp.where(trace > 0, 4 * jnp.finfo(gram.dtype).eps * trace, 1)
    return by_platform(gram + shift * eye, cpu=_eliminate, default=_cholesky)


def _cholesky(gram: Float[Array, "r r"]) -> Float[Array, "r r"]:
    """Returns ``inv(L)`` for ``L L^T = gram`` by the platform's own factorization."""
    # Inverting the small L and multiplying keeps a sharded tall matrix where it is; a triangular
    # solve with the tall matrix as right-hand side would gather it.
    lower = jnp.linalg.cholesky(gram)
    eye = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    return jax.scipy.linalg.solve_triangular(lower, eye, lower=True)


def _eliminate(gram: Float[Array, "r r"]) -> Float[Array, "r r"]:
    """Returns ``inv(L)`` for ``L L^T = gram`` by eliminating ``[gram, I]`` to ``[L^T, inv(L)]``.

    It replaces two LAPACK calls on CPUs. They depend on nothing but the parameters, so they start
    beside the forward pass of the model, and in profiles of a training step they held one of XLA's
    threads for most of it (docs/cost.md).

    Example:
      >>> print(_eliminate(jnp.array([[4.0, 2.0], [2.0, 2.0]])))
      [[ 0.5  0. ]
       [-0.5  1. ]]
    """
    r = gram.shape[-1]
    rest, done = jnp.concatenate([gram, jnp.eye(r, dtype=gram.dtype)], axis=1), []
    # A few rows at a time, each from those above it; one product updates the rows below.
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
