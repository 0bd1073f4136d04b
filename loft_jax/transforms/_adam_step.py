"""One step of LoFT-Adam on the flat leaves of a tree: its state, and how it advances."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loft_jax._basis import Basis
from loft_jax._moments import AdamStep, adam_step, as_scalar
from loft_jax._pairs import PairedTree
from loft_jax._side import (
    Moments,
    SecondMoment,
    advance_moments,
    factor_direction,
    projected_gradient,
)
from loft_jax.transforms import _alternation
from loft_jax.transforms._factors import Group, compute_dtype, group_pairs, leaves_outside


class ScaleByLoftAdamState(NamedTuple):
    """State of `scale_by_loft_adam`. All trees have the structure of the parameters.

    ``r`` below is the rank axis of a factor; where a field has another width than the factor, that
    axis is the one that differs. Dtypes are float32, or the parameter's if that is wider.

    Attributes:
      count: ``()`` int32, steps taken.
      turn: ``()`` int32, 0 when the factor named by ``moves_first`` moves at the next step, else 1.
      basis: for a factor its orthonormal basis at the last step, of the factor's shape;
        `optax.MaskedNode` for a leaf outside pairs.
      mu: first moment, of the parameter's shape, in ``mu_dtype``. A factor's is expressed in
        ``basis`` of its partner.
      nu: second moment. Calibrated: ``r (r + 1) / 2`` packed cross terms a row. Factored: the row
        sums and the laid-out Gram matrix, ``1 + ceil(r (r + 1) / 2 / rows)`` a row. Outside pairs:
        Adam's, of the parameter's shape.
    """

    count: jax.Array
    turn: jax.Array
    basis: Any
    mu: Any
    nu: Any


class Options(NamedTuple):
    """What does not change from step to step; the fields are `scale_by_loft_adam`'s arguments."""

    second: SecondMoment
    calibrate: bool
    alternate: bool
    moves_first: str


def zero_state(
    tree: PairedTree, second: SecondMoment, mu_dtype: jax.typing.DTypeLike | None
) -> tuple[list[Any], list[Any], list[Any]]:
    """Returns zero bases and moments, each laid out and sharded like its parameter."""
    basis: list[Any] = [optax.MaskedNode() for _ in tree.leaves]
    # Each array is made anew: one that served twice could not be donated to a compiled step.
    mu = [jnp.zeros_like(x, dtype=mu_dtype or compute_dtype(x)) for x in tree.leaves]
    nu = [jnp.zeros_like(x, dtype=compute_dtype(x)) for x in tree.leaves]
    for pair in tree.pairs:
        for k, layout, rows in ((pair.a, pair.layout_a, pair.m), (pair.b, pair.layout_b, pair.n)):
            basis[k], rank = jnp.zeros_like(nu[k]), layout.rank
            # Broadcasting from one rank column keeps the sharding of the other axes.
            column = jax.lax.slice_in_dim(nu[k], 0, 1, axis=rank)
            shape = (*column.shape[:rank], second.width(rows, pair.r), *column.shape[rank + 1 :])
            nu[k] = jnp.broadcast_to(column, shape)
    return basis, mu, nu


class _Side(NamedTuple):
    """A side of a group after this step's gradient: its moments in the basis of the partner."""

    moments: Moments
    basis: Basis


@jax.default_matmul_precision("highest")  # bfloat16 products would drown the cross terms
def loft_adam_step(
    tree: PairedTree,
    options: Options,
    params: list[jax.Array],
    gradients: list[jax.Array],
    state: ScaleByLoftAdamState,
    hyperparams: tuple[float | jax.Array, ...],
) -> tuple[list[jax.Array], ScaleByLoftAdamState]:
    """One step on flat lists of leaves: the directions and the new state."""
    b1, b2, eps = hyperparams
    count = jnp.asarray(optax.safe_increment(state.count))
    directions, basis, mu, nu = list(gradients), list(state.basis), list(state.mu), list(state.nu)

    for k in leaves_outside(tree):
        step = adam_step(count, b1, b2, eps, nu[k].dtype)
        directions[k], mu[k], nu[k] = _adam(gradients[k], mu[k], nu[k], b1, b2, step)

    groups, advanced, steps = group_pairs(tree), [], []
    for group in groups:
        bases = group.bases(params)
        both = []
        for factor, partner in group.sides:
            before = Moments(factor.tall(state.mu), factor.tall(state.nu))
            moments, stored = group.over_batch(
                functools.partial(_advance, options, group.scale, b1, b2)
            )(
                before,
                factor.tall(gradients),
                partner.tall(params),
                bases[partner],
                partner.tall(state.basis),
            )
            both.append(_Side(moments, bases[partner]))
            factor.put(stored.mu, mu, like=state.mu)
            factor.put(stored.nu, nu, like=state.nu)
            partner.put(bases[partner].q, basis, like=state.basis)
        advanced.append(both)
        steps.append(adam_step(count, b1, b2, eps, bases[group.a].q.dtype))

    moved = _move(groups, advanced, steps, options, state.turn)
    for group, of_group in zip(groups, moved, strict=True):
        for (factor, _), direction in zip(group.sides, of_group, strict=True):
            factor.put(direction, directions, like=gradients)
    of_factors = [gradients[k] for pair in tree.pairs for k in (pair.a, pair.b)]
    turn = _alternation.next_turn(state.turn, of_factors)
    return directions, ScaleByLoftAdamState(count, turn, basis, mu, nu)


def _adam(
    gradient: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    b1: float | jax.Array,
    b2: float | jax.Array,
    step: AdamStep,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adam's own direction and moments, for a leaf outside pairs."""
    g = gradient.astype(nu.dtype)
    b1, b2 = as_scalar(b1, nu.dtype), as_scalar(b2, nu.dtype)
    first = b1 * mu.astype(nu.dtype) + (1 - b1) * g
    nu = b2 * nu + (1 - b2) * g * g
    direction = first / step.correction1 / (jnp.sqrt(nu / step.correction2) + step.eps)
    return direction.astype(gradient.dtype), first.astype(mu.dtype), nu


def _advance(
    options: Options,
    scale: float,
    b1: float | jax.Array,
    b2: float | jax.Array,
    before: Moments,
    gradient: jax.Array,
    partner: jax.Array,
    basis: Basis,
    q_before: jax.Array,
) -> tuple[Moments, Moments]:
    """Adds a gradient to one side's moments: in the basis, and as they are stored."""
    second = options.second
    h = projected_gradient(gradient, basis, scale)
    if options.calibrate:
        moments = advance_moments(before, h, q_before.T @ basis.q, b1, b2, second)
        return moments, moments
    # Without calibration the moments stay in the coordinates of the raw factor V = Q L^T:
    # L = V^T Q takes them to the basis, inv(L) back.
    moments = advance_moments(before, h, partner.T @ basis.q, b1, b2, second)
    nu = second.transport(moments.nu, basis.l_inv)
    return moments, Moments(moments.mu @ basis.l_inv, nu)


def _move(
    groups: Sequence[Group],
    advanced: Sequence[Sequence[_Side]],
    steps: Sequence[AdamStep],
    options: Options,
    turn: jax.Array,
) -> list[list[jax.Array]]:
    """Returns the directions of both factors of each group, zero for those that rest.

    One conditional for all of them: the ``m x n`` work of the resting factors does not run.
    """

    def direction(group: Group, step: AdamStep, side: _Side) -> jax.Array:
        direction_of = functools.partial(
            factor_direction,
            scale=group.scale,
            step=step,
            second=options.second,
            copies=math.prod(group.batch),
        )
        return group.over_batch(direction_of)(*side)

    def directions(moving: tuple[bool, bool]) -> list[list[jax.Array]]:
        return [
            [
                direction(group, step, side) if moves else jnp.zeros_like(side.moments.mu)
                for moves, side in zip(moving, both, strict=True)
            ]
            for group, both, step in zip(groups, advanced, steps, strict=True)
        ]

    if not options.alternate:
        return directions((True, True))
    return jax.lax.cond(
        _alternation.a_moves(turn, options.moves_first),
        lambda: directions((True, False)),
        lambda: directions((False, True)),
    )
