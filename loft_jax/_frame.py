"""The frame of a factor: the basis of its span in which its partner's moments are written.

LoFT is written in the orthonormal frame. The raw frame, in which the paper prints its equations, is
kept for the ablations alone: what is left of the method when a block is off depends on it.
"""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from loft_jax._basis import Basis, orthonormal_basis


class Frame(NamedTuple):
    """A basis ``F = V K^T`` of the span of a factor ``V`` (``n x r``), with the scale in ``V``.

    The projected gradient is ``G P_V = H F^T``; ``H`` (``m x r``) are its coordinates.

    Attributes:
      span: ``(n, r)``, ``F``.
      back: ``(r, r)``, ``K``: the update ``H F^T`` of the weight is ``H K`` for the partner factor.
        None where it is the identity.
      metric: ``(r, r)``, ``inv(F^T F)``; None where it is the identity.
    """

    span: Float[Array, "n r"]
    back: Float[Array, "r r"] | None
    metric: Float[Array, "r r"] | None


def orthonormal_frame(v: Float[Array, "n r"], scale: float) -> Frame:
    """Returns the frame of ``scale * V`` in which LoFT is written, see `orthonormal_basis`."""
    basis = orthonormal_basis(v)
    return Frame(basis.q, basis.l_inv / scale, None)


def raw_frame(v: Float[Array, "n r"], scale: float) -> Frame:
    """Returns the columns of ``scale * V`` themselves as a frame."""
    basis = orthonormal_basis(v)
    return Frame(scale * v, None, _inverse_gram(basis) / scale**2)


def _inverse_gram(basis: Basis) -> Float[Array, "r r"]:
    return basis.l_inv.T @ basis.l_inv


def coordinates(gradient: Float[Array, "m r"], frame: Frame) -> Float[Array, "m r"]:
    """Returns ``H`` with ``G P_V = H F^T`` from a factor's gradient ``G V`` (block 2).

    In the orthonormal frame its Frobenius norm is that of the projected full gradient (block 6).

    Example:
      >>> import jax.numpy as jnp
      >>> full = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> v = jnp.array([[0.0], [2.0]])
      >>> coordinates(full @ v, orthonormal_frame(v, 1.0))
      Array([[2.],
             [4.]], dtype=float32)
    """
    return _times(gradient if frame.back is None else gradient @ frame.back.T, frame.metric)


def transport(span_before: Float[Array, "n r"], frame: Frame) -> Float[Array, "r r"]:
    """Returns the calibration matrix ``T``: ``H T`` projects ``H F_-^T`` on the new span (block 3).

    The paper's ``C`` in the raw frame, ``Q_-^T Q`` in the orthonormal one.
    """
    return _times(span_before.T @ frame.span, frame.metric)


def project(rebuilt: Float[Array, "m r"], frame: Frame) -> Float[Array, "m r"]:
    """Returns the coordinates of ``D P_V`` from ``D F`` (block 5)."""
    return _times(rebuilt, frame.metric)


def to_factor(h: Float[Array, "m r"], frame: Frame) -> Float[Array, "m r"]:
    """Returns the partner factor's update with the given coordinates."""
    return _times(h, frame.back)


def _times(x: jax.Array, matrix: jax.Array | None) -> jax.Array:
    return x if matrix is None else x @ matrix
