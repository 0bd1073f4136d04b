"""Clipping by the norm that full fine-tuning would see (block 6)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loft_jax._frame import coordinates
from loft_jax._mesh import in_auto_axes
from loft_jax._pairs import LoraPairs, PairedTree, find_pairs
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
    read_arguments,
)
from loft_jax.transforms._turns import in_turns, turn_count


class ClipByProjectedGlobalNormState(NamedTuple):
    """State of `clip_by_projected_global_norm`.

    Attributes:
      turn: ``()`` int32, 0 when the factor named by ``moves_first`` moves at the next step, else 1.
    """

    turn: jax.Array


def clip_by_projected_global_norm(
    max_norm: float | jax.Array,
    *,
    alternate: bool = True,
    moves_first: _alternation.FactorName = "b",
    pairs: LoraPairs | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips gradients by the norm of the full gradient's projection.

    The gradient of a factor depends on the size of its partner; what full fine-tuning would clip by
    is :math:`\|G P_V\|_F`, for the factor that moves, and that is the norm of the projected
    gradient in the basis, with nothing ``m x n`` formed. Where both factors move it is the norm of
    :math:`G P_V + P_U G`. All pairs and, as they are, the leaves outside them add up to one global
    norm, and all gradients are scaled by ``min(1, max_norm / norm)``.

    Chain it directly before `loft_adamw`, inside the same wrappers (`optax.MultiSteps`,
    `optax.apply_if_finite`), with the same ``alternate``, ``moves_first`` and ``pairs``, so that
    both count the same turns.

    Args:
      max_norm: largest norm to let through.
      alternate, moves_first, pairs: as in `scale_by_loft_adam`.

    Returns:
      A transformation whose ``update`` needs ``params``.

    Raises:
      ValueError, TypeError: as `scale_by_loft_adam`.

    Source: building block 6 of Tastan et al., ICLR 2026.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"lora_a": jnp.full((4, 1), 5.0), "lora_b": jnp.zeros((1, 2))}
      >>> full = jnp.full((4, 2), 0.5)  # gradient of the weight: already in the span of a
      >>> grads = {"lora_a": jnp.zeros((4, 1)), "lora_b": params["lora_a"].T @ full}
      >>> clip = clip_by_projected_global_norm(1.0)
      >>> clipped, _ = clip.update(grads, clip.init(params), params)
      >>> ratio = clipped["lora_b"] / grads["lora_b"]
      >>> bool(jnp.allclose(ratio, 1 / jnp.linalg.norm(full)))
      True
    """
    _alternation.check_factor_name(moves_first)

    def init(params: optax.Params) -> ClipByProjectedGlobalNormState:
        find_pairs(params, pairs)  # so that unpaired factors are told of at once
        return ClipByProjectedGlobalNormState(turn=jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        tree, gradients = read_arguments(params, updates, pairs, parts=True)

        def clip(params, gradients, turn, max_norm):
            moves_a = _alternation.a_moves(turn, moves_first) if alternate else None
            norm = jnp.sqrt(_squared_norm(tree, params, gradients, moves_a))
            # Not max_norm / norm: a zero norm leaves the gradients alone.
            factor = jnp.where(norm > max_norm, max_norm / jnp.where(norm > 0, norm, 1), 1)
            # A norm that is not a number must not pass for a small one.
            factor = jnp.where(jnp.isnan(norm), norm, factor)
            clipped = [(g * factor).astype(g.dtype) for g in gradients]
            # As the optimizer behind it sees them: an infinite norm clips all gradients to zero.
            return clipped, _alternation.next_turn(turn, tree, clipped)

        clipped, turn = in_auto_axes(
            clip, tree.leaves, gradients, state.turn, max_norm, out_like=(gradients, state.turn)
        )
        return tree.treedef.unflatten(clipped), ClipByProjectedGlobalNormState(turn)

    return optax.with_extra_args_support(optax.GradientTransformation(init, update))


@jax.default_matmul_precision("highest")
def _squared_norm(
    tree: PairedTree,
    params: list[jax.Array],
    gradients: list[jax.Array],
    moves_a: jax.Array | None,
) -> jax.Array:
    terms = [
        tree.parts(k).sum(_sum_of_squares(gradients[k].astype(compute_dtype(params[k]))))
        for k in leaves_outside(tree)
    ]
    groups = group_pairs(tree)
    stacks = [group.stacks(params) for group in groups]
    for group, of_params, frames in zip(groups, stacks, early_frames(groups, stacks), strict=True):
        parts = [tree.parts(factor.leaves[0]) for factor in (group.a, group.b)]
        norms = _layer_norms(group, of_params, group.stacks(gradients), frames, moves_a is None)
        of_a, of_b = (rows.sum(jnp.sum(x)) for rows, x in zip(parts, norms[:2], strict=True))
        if moves_a is not None:
            terms.append(jnp.where(moves_a, of_a, of_b))
        else:
            terms += [of_a, of_b, 2 * group.layers.sum(jnp.sum(norms[2]))]
    return jnp.stack(terms).sum() if terms else jnp.zeros([])


def _layer_norms(
    group: Group, params: Sides, gradients: Sides, frames: Frames | None, both: bool
) -> tuple[jax.Array, ...]:
    """Returns ``|G P_V|^2`` and ``|P_U G|^2`` of each layer, of the rows that are here.

    With ``both`` also their inner product, ``|P_U G P_V|^2``. Without ``frames``: made here.
    """

    def of_pair(pair: Sides, frames: Frames) -> tuple[jax.Array, ...]:
        h_a, h_b = map(coordinates, group.tall_matrices(pair), reversed(frames))
        shared = [group.a.rows.sum(frames[0].span.T @ h_a)] if both else []
        return tuple(map(_sum_of_squares, [h_a, h_b, *shared]))

    def of_layers(
        _: tuple[jax.Array, ...], params: Sides, gradients: Sides, frames: Frames | None
    ) -> tuple[jax.Array, ...]:
        if frames is None:
            (frames,) = factor_frames([group], [params])
        return group.over_batch(of_pair)(gradients, frames)

    turns = turn_count(group.batch, group.longest)
    # Inside a shard_map zeros must be as different between devices as what takes their place.
    one = lambda x: jnp.zeros_like(x[(..., *[0] * (x.ndim - len(group.batch)))], group.a.dtype)
    of_a, of_b = (one(p) + one(g) for p, g in zip(params, gradients, strict=True))
    nothing = (of_a, of_b, group.a.rows.sum(of_a)) if both else (of_a, of_b)
    return in_turns(of_layers, group.batch, turns)(nothing, params, gradients, frames)


def _sum_of_squares(x: jax.Array) -> jax.Array:
    return jnp.sum(x * x)
