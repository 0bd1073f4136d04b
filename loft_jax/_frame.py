"""The frame of a factor: the basis of its span in which its partner's moments are written.

LoFT is written in the orthonormal frame. The raw frame, in which the paper prints its equations, is
kept for the ablations alone: what is left of the method when a block is off depends on it.
"""

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Array, Float

from loft_jax._basis import Basis, orthonormal_bases
from loft_jax._rows import WHOLE, Rows


class Frame(NamedTuple):
    """A basis ``F`` of the span of a factor ``V`` (``n x r``), with the adapter's scale in ``V``.

    The projected gradient is ``G P_V = H F^T``; ``H`` (``m x r``) are its coordinates.

    Attributes:
      basis: the orthonormal basis ``Q`` of ``V``. All inverses are taken through it: one of
        ``V^T V`` would lose the square of what the basis loses.
      raw: ``(n, r)``, ``V``, where that is ``F``. None where ``F`` is ``Q``.
      rows: how the rows of ``V`` are spread.
    """

    basis: Basis
    raw: Float[Array, "n r"] | None
    rows: Rows = WHOLE

    @property
    def span(self) -> Float[Array, "*batch n r"]:
        """``F``, ``(n, r)``; of a stack of frames a stack."""
        return self.basis.q if self.raw is None else self.raw


def orthonormal_frames(
    factors: Sequence[Array], scales: Sequence[float], rows: Sequence[Rows]
) -> list[Frame]:
    """Returns the frames of ``scale * V`` in which LoFT is written, see `orthonormal_bases`."""
    bases = orthonormal_bases(factors, rows)
    return [
        Frame(Basis(basis.q, basis.l_inv / scale), None, part)
        for basis, scale, part in zip(bases, scales, rows, strict=True)
    ]


def raw_frames(
    factors: Sequence[Array], scales: Sequence[float], rows: Sequence[Rows]
) -> list[Frame]:
    """Returns the columns of each ``scale * V`` themselves as its frame."""
    frames = orthonormal_frames(factors, scales, rows)
    return [
        frame._replace(raw=scale * v)
        for frame, v, scale in zip(frames, factors, scales, strict=True)
    ]


def orthonormal_frame(v: Float[Array, "n r"], scale: float, rows: Rows = WHOLE) -> Frame:
    """Returns `orthonormal_frames` of one factor."""
    return orthonormal_frames([v], [scale], [rows])[0]


def raw_frame(v: Float[Array, "n r"], scale: float, rows: Rows = WHOLE) -> Frame:
    """Returns `raw_frames` of one factor."""
    return raw_frames([v], [scale], [rows])[0]


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
      >>> coordinates(full @ v, raw_frame(v, 1.0))
      Array([[1.],
             [2.]], dtype=float32)
    """
    return _from_basis(gradient @ frame.basis.l_inv.T, frame)


def transport(span_before: Float[Array, "n r"], frame: Frame) -> Float[Array, "r r"]:
    """Returns the calibration matrix ``T``: ``H T`` projects ``H F_-^T`` on the new span (block 3).

    The paper's ``C`` in the raw frame, ``Q_-^T Q`` in the orthonormal one.
    """
    return _from_basis(frame.rows.sum(span_before.T @ frame.basis.q), frame)


def project(rebuilt: Float[Array, "m r"], frame: Frame) -> Float[Array, "m r"]:
    """Returns the coordinates of ``D P_V`` from ``D F`` (block 5)."""
    return rebuilt if frame.raw is None else coordinates(rebuilt, frame)


def to_factor(h: Float[Array, "m r"], frame: Frame) -> Float[Array, "m r"]:
    """Returns the update of the partner factor that moves the weight by ``H F^T``."""
    return h @ frame.basis.l_inv if frame.raw is None else h


def _from_basis(h: Float[Array, "m r"], frame: Frame) -> Float[Array, "m r"]:
    """Takes coordinates in ``Q`` to coordinates in ``F``."""
    return h if frame.raw is None else h @ frame.basis.l_inv
