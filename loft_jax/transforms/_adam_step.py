"""LoFT-Adam as a method of `_step.py`: its state, its moments, and Adam for the other leaves."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loft_jax._entrywise import entrywise_direction
from loft_jax._frame import Frame
from loft_jax._moments import AdamStep, adam_step, as_scalar
from loft_jax._pairs import PairedTree
from loft_jax._rounding import round_at_random
from loft_jax._rows import Rows
from loft_jax._side import Calibration, Moments, SecondMoment, advance_moments, factor_direction
from loft_jax.transforms._factors import compute_dtype
from loft_jax.transforms._step import Blocks, Memory, Method, loft_step


class ScaleByLoftAdamState(NamedTuple):
    """State of `scale_by_loft_adam`. All trees have the structure of the parameters.

    ``r`` below is the rank axis of a factor; where a field has another width than the factor, that
    axis is the one that differs. Dtypes are float32, or the parameter's if that is wider.

    Attributes:
      count: ``()`` int32, steps taken.
      turn: ``()`` int32, 0 when the factor named by ``moves_first`` moves at the next step, else 1.
      basis: for a factor its orthonormal basis at the last step, of the factor's shape (in the
        ablations the factor itself, with its scale); `optax.MaskedNode` for a leaf outside pairs.
      mu: first moment, of the parameter's shape, in ``mu_dtype``. A factor's is expressed in
        ``basis`` of its partner.
      nu: second moment. Calibrated: ``r (r + 1) / 2`` packed cross terms a row. Factored: the row
        sums and the laid-out Gram matrix, ``1 + ceil(r (r + 1) / 2 / rows)`` a row. Diagonal: one
        number for each of ``mu``. A factor's is in ``nu_dtype``. Outside pairs: Adam's, of
        the parameter's shape.
    """

    count: jax.Array
    turn: jax.Array
    basis: Any
    mu: Any
    nu: Any


def loft_adam_step(
    tree: PairedTree,
    blocks: Blocks,
    second: SecondMoment,
    params: list[jax.Array],
    gradients: list[jax.Array],
    state: ScaleByLoftAdamState,
    hyperparams: tuple[float | jax.Array, ...],
) -> tuple[list[jax.Array], ScaleByLoftAdamState]:
    """One step on flat lists of leaves: the directions and the new state."""
    b1, b2, eps = hyperparams
    count = jnp.asarray(optax.safe_increment(state.count))
    dtypes = {compute_dtype(x) for x in params}
    steps = {dtype: adam_step(count, b1, b2, eps, dtype) for dtype in dtypes}

    def advance(
        before: tuple[jax.Array, ...], h: jax.Array, calibration: Calibration | None, rows: Rows
    ) -> Moments:
        return advance_moments(Moments(*before), h, calibration, b1, b2, second, rows)

    def direction(
        moments: Moments, h: jax.Array, frame: Frame, copies: int, rows: Rows
    ) -> jax.Array:
        step = steps[moments.mu.dtype]
        return factor_direction(moments, frame, step, second, blocks.reconstruct, copies, rows)

    def narrow(moments: Moments, dtypes: Sequence[jnp.dtype]) -> Moments:
        return Moments(moments.mu.astype(dtypes[0]), round_at_random(moments.nu, dtypes[1], count))

    outside = functools.partial(_adam, b1, b2, steps)
    directions, turn, memory = loft_step(
        tree,
        Method(advance, direction, outside, second.work, narrow),
        blocks,
        params,
        gradients,
        state.turn,
        Memory(state.basis, (state.mu, state.nu)),
    )
    return directions, ScaleByLoftAdamState(count, turn, memory.basis, *memory.moments)


def _adam(
    b1: float | jax.Array,
    b2: float | jax.Array,
    steps: dict[jnp.dtype, AdamStep],
    gradient: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adam's own direction and moments, for a leaf outside pairs."""
    g = gradient.astype(nu.dtype)
    b1, b2 = as_scalar(b1, nu.dtype), as_scalar(b2, nu.dtype)
    first = b1 * mu.astype(nu.dtype) + (1 - b1) * g
    nu = b2 * nu + (1 - b2) * g * g
    direction = entrywise_direction(first, nu, steps[nu.dtype])
    return direction.astype(gradient.dtype), first.astype(mu.dtype), nu
