"""One side of a pair: the moments of a factor, in the frame of its partner (blocks 3 to 5).

Everything is written for a factor ``U`` (``m x r``) and its partner ``V`` (``n x r``) in
``W = W0 + scale * U V^T``; the side of ``V`` is the same function with the roles exchanged.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from loft_jax import _entrywise, _factored, _moments, _projection
from loft_jax._frame import Frame, project, to_factor
from loft_jax._moments import AdamStep, as_scalar
from loft_jax._rows import WHOLE, Rows


class SecondMoment(NamedTuple):
    """A way to keep the second moment of a side.

    Attributes:
      width: ``(m, r) ->`` numbers of state per row of the factor.
      transport: ``(nu, T, rows) -> nu`` in the frame that ``T`` leads to.
      accumulate: ``(nu, h, b2, rows) -> nu`` with one more gradient.
      rebuild: ``(mu, nu, frame, step, copies, rows) -> D F``, with the Adam direction ``D`` (``m x
        n``) of the full weight and the frame's span ``F``; ``copies`` of it are computed at once.
        None where the state does not determine ``D``.
      diagonal: ``(nu, r, rows) -> (m, r)``, the second moment of each coordinate.
      bound: ``(step) ->`` the largest ratio that ``diagonal`` may lead to.
      skips: whether to leave the transport out where the frame has not turned.
      work: ``(m, n, r) ->`` numbers that the direction of one matrix makes on its way.
    """

    width: Callable[[int, int], int]
    transport: Callable[..., jax.Array]
    accumulate: Callable[..., jax.Array]
    rebuild: Callable[..., jax.Array] | None
    diagonal: Callable[..., jax.Array]
    bound: Callable[[AdamStep], jax.Array]
    skips: bool
    work: Callable[[int, int, int], int]


def _guard(step: AdamStep) -> jax.Array:
    """Ten times what Adam's own ratio can reach: training does not, a blow-up would.

    Squares that stay behind when the frame turns have no bound for the moment that comes along.
    """
    return 10 * step.limit


SECOND_MOMENTS: dict[str, SecondMoment] = {
    "calibrated": SecondMoment(
        lambda m, r: _moments.packed_size(r),
        lambda nu, transport, rows: _moments.transport_cross_terms(nu, transport),
        lambda nu, h, b2, rows: _moments.accumulate_cross_terms(nu, h, b2),
        lambda mu, nu, frame, step, copies, rows: _projection.project_adam_direction(
            mu, nu, frame.span, step, copies, rows, frame.rows
        ),
        lambda nu, r, rows: _entrywise.diagonal_of_cross_terms(nu, r),
        lambda step: step.bound,
        True,  # by far the most work on moments, and reading and writing them is the next
        lambda m, n, r: m * n,
    ),
    "factored": SecondMoment(
        _factored.factored_width,
        _factored.transport_factored,
        _factored.accumulate_factored,
        # No blocks to size: nothing here is larger than the factors.
        lambda mu, nu, frame, step, copies, rows: _factored.factored_adam_direction(
            mu, nu, frame.span, step, rows, frame.rows
        ),
        _entrywise.diagonal_of_factored,
        _guard,
        False,
        lambda m, n, r: m * r,
    ),
    "diagonal": SecondMoment(
        lambda m, r: r,
        lambda nu, transport, rows: nu,  # Left behind when the frame turns: LoFT (simple).
        lambda nu, h, b2, rows: b2 * nu + (1 - b2) * h * h,
        None,
        lambda nu, r, rows: nu,
        _guard,
        False,
        lambda m, n, r: m * r,
    ),
}


class Calibration(NamedTuple):
    """How the moments come into the partner's new frame.

    Attributes:
      matrix: ``(r, r)``, the paper's ``C``: the old frame's coordinates in the new.
      turned: ``()`` bool, whether the frame has changed at all. While factors take turns, one of
        the two frames has not, and its ``matrix`` is the identity up to rounding.
    """

    matrix: Float[Array, "r r"]
    turned: jax.Array | None


class Moments(NamedTuple):
    """First and second moment of a side: ``mu`` is ``(m, r)``, ``nu`` is ``(m, width)``."""

    mu: Float[Array, "m r"]
    nu: Float[Array, "m width"]


def advance_momentum(
    before: Float[Array, "..."],
    h: Float[Array, "..."],
    transport: Float[Array, "r r"] | None,
    decay: float | jax.Array,
    weight: float | jax.Array = 1.0,
) -> Float[Array, "..."]:
    """Returns ``decay * before @ transport + weight * h`` (block 3); no transport: left as it is.

    ``before`` and ``h`` are ``(m, r)``; without a transport of any one shape.

    Example:
      >>> import jax.numpy as jnp
      >>> m, h = jnp.array([[1.0, 2.0]]), jnp.array([[5.0, 5.0]])
      >>> advance_momentum(m, h, jnp.diag(jnp.array([1.0, 0.0])), 0.5)
      Array([[5.5, 5. ]], dtype=float32)
    """
    carried = before if transport is None else before @ transport
    return decay * carried + weight * h


def advance_moments(
    before: Moments,
    h: Float[Array, "m r"],
    calibration: Calibration | None,
    b1: float | jax.Array,
    b2: float | jax.Array,
    second: SecondMoment,
    rows: Rows = WHOLE,
) -> Moments:
    """Carries the moments into the new frame and adds the gradient (blocks 3 and 4).

    ``rows`` says how the rows of the moments are spread.
    """
    b1, b2 = (as_scalar(b, before.nu.dtype) for b in (b1, b2))
    accumulate = lambda nu: second.accumulate(nu, h, b2, rows)
    if calibration is None:
        return Moments(advance_momentum(before.mu, h, None, b1, 1 - b1), accumulate(before.nu))
    matrix, turned = calibration
    mu = advance_momentum(before.mu, h, matrix, b1, 1 - b1)
    carry = lambda nu: accumulate(second.transport(nu, matrix, rows))
    if turned is None or not second.skips:
        return Moments(mu, carry(before.nu))
    return Moments(mu, jax.lax.cond(turned, carry, accumulate, before.nu))


def factor_direction(
    moments: Moments,
    frame: Frame,
    step: AdamStep,
    second: SecondMoment,
    reconstruct: bool = True,
    copies: int = 1,
    rows: Rows = WHOLE,
) -> Float[Array, "m r"]:
    """Returns ``dU`` with ``scale * dU V^T = D P_V``: rebuilt and projected (block 5).

    Where the second moment does not determine ``D``, or ``reconstruct`` is off, Adam's ratio is
    taken entry by entry in the frame instead.
    """
    mu, nu = moments
    if reconstruct and second.rebuild is not None:
        rebuilt = second.rebuild(mu, nu, frame, step, copies, rows)
        return to_factor(project(rebuilt, frame), frame)
    direction = _entrywise.entrywise_direction(mu, second.diagonal(nu, mu.shape[1], rows), step)
    bound = second.bound(step)
    return to_factor(jnp.clip(direction, -bound, bound), frame)
