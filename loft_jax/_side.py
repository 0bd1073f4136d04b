"""One side of a pair: the moments of a factor, in the basis of its partner (blocks 2 to 5).

Everything is written for a factor ``U`` (``m x r``) and its partner ``V`` (``n x r``) in
``W = W0 + scale * U V^T``; the side of ``V`` is the same function with the roles exchanged.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from loft_jax import _factored, _moments, _projection
from loft_jax._basis import Basis
from loft_jax._moments import AdamStep


class SecondMoment(NamedTuple):
    """A way to keep the second moment of a side.

    Attributes:
      width: ``(m, r) ->`` numbers of state per row of the factor.
      transport: ``(nu, T) -> nu`` in the basis that ``T`` leads to.
      accumulate: ``(nu, h, b2) -> nu`` with one more gradient.
      direction: ``(mu, nu, q, step, copies) -> D @ q``, the Adam direction projected on the basis;
        ``copies`` of it are computed at once.
    """

    width: Callable[[int, int], int]
    transport: Callable[..., jax.Array]
    accumulate: Callable[..., jax.Array]
    direction: Callable[..., jax.Array]


SECOND_MOMENTS: dict[str, SecondMoment] = {
    "calibrated": SecondMoment(
        lambda m, r: _moments.packed_size(r),
        _moments.transport_cross_terms,
        _moments.accumulate_cross_terms,
        _projection.project_adam_direction,
    ),
    "factored": SecondMoment(
        _factored.factored_width,
        _factored.transport_factored,
        _factored.accumulate_factored,
        # No blocks to size: nothing here is larger than the factors.
        lambda mu, nu, q, step, copies: _factored.factored_adam_direction(mu, nu, q, step),
    ),
}


class Moments(NamedTuple):
    """First and second moment of a side: ``mu`` is ``(m, r)``, ``nu`` is ``(m, width)``."""

    mu: Float[Array, "m r"]
    nu: Float[Array, "m width"]


def projected_gradient(
    gradient: Float[Array, "m r"], basis: Basis, scale: float
) -> Float[Array, "m r"]:
    """Returns ``h = G Q`` from ``gradient = G V scale``, so that ``G P_V = h Q^T`` (block 2).

    The Frobenius norm of ``h`` is that of the projected full gradient (block 6).
    """
    return gradient @ basis.l_inv.T / scale


def advance_moments(
    before: Moments,
    h: Float[Array, "m r"],
    transport: Float[Array, "r r"],
    b1: float | jax.Array,
    b2: float | jax.Array,
    second: SecondMoment,
) -> Moments:
    """Carries the moments into the new basis and adds the gradient (blocks 3 and 4)."""
    b1, b2 = (_moments.as_scalar(b, before.nu.dtype) for b in (b1, b2))
    mu = b1 * (before.mu @ transport) + (1 - b1) * h
    return Moments(mu, second.accumulate(second.transport(before.nu, transport), h, b2))


def factor_direction(
    moments: Moments,
    basis: Basis,
    scale: float,
    step: AdamStep,
    second: SecondMoment,
    copies: int = 1,
) -> Float[Array, "m r"]:
    """Returns ``dU`` with ``scale * dU V^T = D P_V``: rebuilt, projected (block 5)."""
    projected = second.direction(moments.mu, moments.nu, basis.q, step, copies)
    return projected @ basis.l_inv / scale
