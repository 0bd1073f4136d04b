"""One step of any LoFT optimizer on the flat leaves of a tree: what they all share.

The optimizers differ in what they remember of past gradients and in the direction they make of it.
Which factor moves, the frames, the projected gradient and the calibration are the same for all.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loft_jax._frame import Frame, coordinates, orthonormal_frame, raw_frame, transport
from loft_jax._pairs import PairedTree
from loft_jax._rows import Rows
from loft_jax.transforms import _alternation
from loft_jax.transforms._factors import (
    Factor,
    Group,
    compute_dtype,
    group_pairs,
    leaves_outside,
    widened,
)


class Blocks(NamedTuple):
    """Which of the paper's building blocks are on, for its ablations.

    Attributes:
      alternate: block 1; else both factors move from the same point.
      scale_gradient: block 2; else the factor's own gradient takes the projected one's place.
      calibrate: blocks 3 and 4; else moments stay as they are when the partner moves.
      reconstruct: block 5; else a nonlinear direction is taken entry by entry in the frame.
      moves_first: the factor that moves first, "a" or "b".
    """

    alternate: bool = True
    scale_gradient: bool = True
    calibrate: bool = True
    reconstruct: bool = True
    moves_first: _alternation.FactorName = "b"

    @property
    def frame(self) -> Callable[..., Frame]:
        """The frame of the moments. In the whole method it makes no difference but to rounding.

        With a block off it does, and the ablation is meant in the coordinates of the paper.
        """
        whole = self.scale_gradient and self.calibrate and self.reconstruct
        return orthonormal_frame if whole else raw_frame


class Memory(NamedTuple):
    """What an optimizer keeps of the leaves, in flat lists.

    Attributes:
      basis: for a factor its frame at the last step, of the factor's shape; `optax.MaskedNode` for
        a leaf outside pairs.
      moments: one list for each of the method's moments.
    """

    basis: list[Any]
    moments: tuple[list[Any], ...]


class Method(NamedTuple):
    """An optimizer, as functions of matrices.

    Attributes:
      advance: ``(moments, h, T, rows) -> (moments, source)`` adds the projected gradient ``h`` to
        a side's moments, which ``T`` carries into the new frame (None: it leaves them). ``source``
        is whatever ``direction`` needs, ``rows`` how the factor's are spread.
      direction: ``(source, frame, copies, rows) ->`` the update of the factor, ``(m, r)``.
      outside: ``(gradient, *moments) -> (direction, *moments)`` for a leaf outside pairs.
      held: ``(m, n, r) ->`` numbers that ``direction`` holds at once on its way for one matrix.
    """

    advance: Callable[..., tuple[tuple[jax.Array, ...], Any]]
    direction: Callable[..., jax.Array]
    outside: Callable[..., tuple[jax.Array, ...]]
    held: Callable[[int, int, int], int] = lambda m, n, r: m * r


class _Side(NamedTuple):
    """A side of a group after this step's gradient."""

    source: Any
    frame: Frame
    h: jax.Array


def zero_memory(
    tree: PairedTree,
    widths: Sequence[Callable[[int, int], int]],
    dtypes: Sequence[jax.typing.DTypeLike | None],
) -> Memory:
    """Returns zero frames and moments, each laid out and sharded like its parameter.

    Args:
      tree: the parameters.
      widths: for each moment ``(m, r) ->`` numbers of state per row of a factor.
      dtypes: for each moment its dtype, None for that of the computation.
    """
    # Each array is made anew: one that served twice could not be donated to a compiled step.
    basis: list[Any] = [optax.MaskedNode() for _ in tree.leaves]
    moments = tuple(
        [jnp.zeros_like(x, dtype=dtype or compute_dtype(x)) for x in tree.leaves]
        for dtype in dtypes
    )
    for pair in tree.pairs:
        for k, layout, rows in ((pair.a, pair.layout_a, pair.m), (pair.b, pair.layout_b, pair.n)):
            factor, rank = tree.leaves[k], layout.rank
            basis[k] = jnp.zeros_like(factor, dtype=compute_dtype(factor))
            for moment, width in zip(moments, widths, strict=True):
                moment[k] = widened(moment[k], rank, width(rows, pair.r))
    return Memory(basis, moments)


@jax.default_matmul_precision("highest")  # bfloat16 products would drown the cross terms
def loft_step(
    tree: PairedTree,
    method: Method,
    blocks: Blocks,
    params: list[jax.Array],
    gradients: list[jax.Array],
    turn: jax.Array,
    before: Memory,
) -> tuple[list[jax.Array], jax.Array, Memory]:
    """One step on flat lists of leaves: the directions, the next turn and the new memory."""
    directions = list(gradients)
    after = Memory(list(before.basis), tuple(list(moment) for moment in before.moments))

    for k in leaves_outside(tree):
        of_leaf = (moment[k] for moment in before.moments)
        directions[k], *new = method.outside(gradients[k], *of_leaf)
        for moment, value in zip(after.moments, new, strict=True):
            moment[k] = value

    groups, advanced = group_pairs(tree), []
    for group in groups:
        frames = group.of_factors(functools.partial(blocks.frame, scale=group.scale), params)
        both = []
        for factor, partner in group.sides:
            moments_before = tuple(factor.tall(moment) for moment in before.moments)
            widest = max((math.prod(x.shape[-2:]) for x in moments_before), default=0)
            advance = functools.partial(_advance, method, blocks, factor.rows)
            moments, side = group.in_turns(advance, group.turns(widest))(
                moments_before,
                factor.tall(gradients),
                frames[partner],
                partner.tall(before.basis) if before.moments else None,
            )
            for moment, new, old in zip(after.moments, moments, before.moments, strict=True):
                factor.put(new, moment, like=old)
            if before.moments:
                partner.put(frames[partner].span, after.basis, like=before.basis)
            both.append(side)
        advanced.append(both)

    moved = _move(groups, advanced, method, blocks, turn)
    for group, of_group in zip(groups, moved, strict=True):
        for (factor, _), direction in zip(group.sides, of_group, strict=True):
            factor.put(direction, directions, like=gradients)
    return directions, _alternation.next_turn(turn, tree, gradients), after


def _advance(
    method: Method,
    blocks: Blocks,
    rows: Rows,
    moments: tuple[jax.Array, ...],
    gradient: jax.Array,
    frame: Frame,
    span_before: jax.Array | None,
) -> tuple[tuple[jax.Array, ...], _Side]:
    """Adds a gradient to one side's moments (blocks 2 to 4)."""
    h = coordinates(gradient, frame) if blocks.scale_gradient else gradient
    calibration = None
    if blocks.calibrate and span_before is not None:
        calibration = transport(span_before, frame)
    moments, source = method.advance(moments, h, calibration, rows)
    return moments, _Side(source, frame, h)


def _move(
    groups: Sequence[Group],
    advanced: Sequence[Sequence[_Side]],
    method: Method,
    blocks: Blocks,
    turn: jax.Array,
) -> list[list[jax.Array]]:
    """Returns the directions of both factors of each group, zero for those that rest.

    One conditional for all of them: the ``m x n`` work of the resting factors does not run.
    """

    def direction(group: Group, factor: Factor, side: _Side) -> jax.Array:
        m, r = side.h.shape[-2:]
        turns = group.turns(method.held(m, side.frame.span.shape[-2], r))
        copies = math.prod(group.batch) // turns
        of_one = functools.partial(method.direction, copies=copies, rows=factor.rows)
        return group.in_turns(of_one, turns)(side.source, side.frame)

    def directions(moving: tuple[bool, bool]) -> list[list[jax.Array]]:
        return [
            [
                direction(group, factor, side) if moves else jnp.zeros_like(side.h)
                for moves, (factor, _), side in zip(moving, group.sides, both, strict=True)
            ]
            for group, both in zip(groups, advanced, strict=True)
        ]

    if not blocks.alternate:
        return directions((True, True))
    return jax.lax.cond(
        _alternation.a_moves(turn, blocks.moves_first),
        lambda: directions((True, False)),
        lambda: directions((False, True)),
    )
