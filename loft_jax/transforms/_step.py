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

from loft_jax._frame import Frame, coordinates, orthonormal_frames, raw_frames, transport
from loft_jax._pairs import PairedTree
from loft_jax._rows import Rows
from loft_jax._side import Calibration
from loft_jax.transforms import _alternation
from loft_jax.transforms._factors import (
    Frames,
    Group,
    Sides,
    compute_dtype,
    early_frames,
    factor_frames,
    group_pairs,
    leaves_outside,
    widened,
)
from loft_jax.transforms._turns import in_turns, turn_count


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
    def frames(self) -> Callable[..., list[Frame]]:
        """Makes the frames of the moments. In the whole method only rounding depends on which.

        With a block off more does, and the ablation is meant in the coordinates of the paper.
        """
        whole = self.scale_gradient and self.calibrate and self.reconstruct
        return orthonormal_frames if whole else raw_frames


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
      advance: ``(moments, h, calibration, rows) -> moments`` adds the projected gradient ``h`` to a
        side's moments, carried into the new frame (calibration None: they are left as they are).
        ``rows`` is how the factor's are spread.
      direction: ``(moments, h, frame, copies, rows) ->`` the update of the factor, ``(m, r)``, from
        the new moments; ``copies`` of it are computed at once.
      narrow: ``(moments, dtypes) -> moments`` in the dtypes in which the state keeps them.
      outside: ``(gradient, *moments) -> (direction, *moments)`` for a leaf outside pairs.
      work: ``(m, n, r) ->`` numbers that ``direction`` makes on its way for one matrix.
    """

    advance: Callable[..., tuple[jax.Array, ...]]
    direction: Callable[..., jax.Array]
    outside: Callable[..., tuple[jax.Array, ...]]
    work: Callable[[int, int, int], int] = lambda m, n, r: m * r
    narrow: Callable[..., tuple[jax.Array, ...]] = lambda moments, dtypes: tuple(
        x.astype(dtype) for x, dtype in zip(moments, dtypes, strict=True)
    )


def zero_memory(
    tree: PairedTree,
    widths: Sequence[Callable[[int, int], int]],
    dtypes: Sequence[jax.typing.DTypeLike | None],
    factor_dtypes: Sequence[jax.typing.DTypeLike | None] | None = None,
) -> Memory:
    """Returns zero frames and moments, each laid out and sharded like its parameter.

    Args:
      tree: the parameters.
      widths: for each moment ``(m, r) ->`` numbers of state per row of a factor.
      dtypes: for each moment its dtype, None for that of the computation.
      factor_dtypes: for each moment its dtype for factors, None for the same as of other leaves.
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
            for moment, width, dtype in zip(
                moments, widths, factor_dtypes or [None] * len(widths), strict=True
            ):
                moment[k] = widened(moment[k], rank, width(rows, pair.r))
                if dtype is not None:
                    moment[k] = moment[k].astype(dtype)
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
    next_turn = _alternation.next_turn(turn, tree, gradients)
    after = Memory(list(before.basis), tuple(list(moment) for moment in before.moments))

    for k in leaves_outside(tree):
        of_leaf = (moment[k] for moment in before.moments)
        directions[k], *new = method.outside(gradients[k], *of_leaf)
        for moment, value in zip(after.moments, new, strict=True):
            moment[k] = value

    groups = group_pairs(tree)
    stacks = [group.stacks(params) for group in groups]
    early = early_frames(groups, stacks, blocks.frames)
    for group, of_params, frames in zip(groups, stacks, early, strict=True):
        layers = _Layers(
            moved=group.stacks(gradients),
            moments=tuple(group.stacks(moment) for moment in before.moments),
        )
        spans = group.stacks(before.basis) if before.moments else None
        layers, spans = _step_of_group(
            group, method, blocks, turn, layers, spans, of_params, frames
        )
        group.unstack(layers.moved, directions, like=gradients)
        if spans is not None:
            group.unstack(spans, after.basis, like=before.basis)
        for new, moment, old in zip(layers.moments, after.moments, before.moments, strict=True):
            group.unstack(new, moment, like=old)
    return directions, next_turn, after


class _Layers(NamedTuple):
    """What a step makes anew of some layers: stacks of both factors, as they lie.

    Attributes:
      moved: gradients before the step, directions after it, which so need no room of their own.
      moments: of each kind.
    """

    moved: Sides
    moments: tuple[Sides, ...]


def _step_of_group(
    group: Group,
    method: Method,
    blocks: Blocks,
    turn: jax.Array,
    layers: _Layers,
    spans: Sides | None,
    params: Sides,
    frames: Frames | None,
) -> tuple[_Layers, Sides | None]:
    """One step of a group's factors, in turns where it is long.

    A pair's moments and its direction are made in one go, while the moments are at hand: to go over
    all of them twice costs more than the arithmetic does where memory is slow. Without ``frames``
    each turn makes its own.
    """
    (m, r), (n, _) = group.shapes
    widest = [math.prod(x.shape[len(group.batch) :]) for x in jax.tree.leaves(layers.moments)]
    work = max(method.work(m, n, r), method.work(n, m, r), *widest)
    turns = turn_count(group.batch, group.longest, work)
    copies = math.prod(group.batch) // turns
    take_turns: Callable[..., Any] = lambda fn: in_turns(fn, group.batch, turns)

    def of_layers(layers: _Layers, spans: Sides | None, frames: Frames, turned: Sides) -> _Layers:
        step = functools.partial(_step_of_pair, group, method, blocks, turn, copies, turned)
        return group.over_batch(step)(layers, spans, frames)

    def spans_of(frames: Frames, like: Sides | None) -> Sides | None:
        return like and group.untall([frame.span for frame in frames], like)

    if frames is not None:  # What is not made in the turns need not go round with their state.
        turned = _turned(group, spans, frames)
        step = lambda layers, spans, frames: of_layers(layers, spans, frames, turned)
        return take_turns(step)(layers, spans, frames), spans_of(frames, spans)

    def make_frames_too(state: tuple[_Layers, Sides | None], params: Sides) -> Any:
        layers, spans = state
        (frames,) = factor_frames([group], [params], blocks.frames)
        turned = _turned(group, spans, frames)
        return of_layers(layers, spans, frames, turned), spans_of(frames, spans)

    return take_turns(make_frames_too)((layers, spans), params)


def _step_of_pair(
    group: Group,
    method: Method,
    blocks: Blocks,
    turn: jax.Array,
    copies: int,
    turned: Sides,
    pair: _Layers,
    spans_before: Sides | None,
    frames: Frames,
) -> _Layers:
    """One step of the factors of a pair, of which ``copies`` are computed at once."""
    factors, sides = (group.a, group.b), ((0, 1), (1, 0))
    gradients = group.tall_matrices(pair.moved)
    spans = None if spans_before is None else group.tall_matrices(spans_before)
    moments = [group.tall_matrices(moment) for moment in pair.moments]
    after, h = [], []
    for own, other in sides:
        frame, gradient = frames[other], gradients[own]
        h.append(coordinates(gradient, frame) if blocks.scale_gradient else gradient)
        calibration = None
        if blocks.calibrate and spans is not None:
            calibration = Calibration(transport(spans[other], frame), turned[other])
        before = tuple(moment[own] for moment in moments)
        after.append(method.advance(before, h[own], calibration, factors[own].rows))

    def directions(*moving: bool) -> list[jax.Array]:
        return [
            method.direction(after[own], h[own], frames[other], copies, factors[own].rows)
            if moving[own]
            else jnp.zeros_like(h[own])
            for own, other in sides
        ]

    if blocks.alternate:  # The m x n work of the factor that rests does not run.
        moved = jax.lax.cond(
            _alternation.a_moves(turn, blocks.moves_first),
            lambda: directions(True, False),
            lambda: directions(False, True),
        )
    else:
        moved = directions(True, True)
    kept = [
        method.narrow(new, [moment[own].dtype for moment in pair.moments])
        for own, new in enumerate(after)
    ]
    return _Layers(
        moved=group.untall_matrices(moved, like=pair.moved),
        moments=tuple(
            group.untall_matrices(new, like=old)
            for new, old in zip(zip(*kept, strict=True), pair.moments, strict=True)
        ),
    )


def _turned(group: Group, spans_before: Sides | None, frames: Frames) -> Sides:
    """Whether a factor's frame is another than at the last step, in any layer, anywhere."""
    if spans_before is None:
        return (None, None)
    found = []
    for factor, span, frame in zip(
        (group.a, group.b), group.tall(spans_before), frames, strict=True
    ):
        everywhere = Rows((*factor.rows.axes, *group.layers.axes))
        found.append(everywhere.max(jnp.any(span != frame.span)))
    return tuple(found)
