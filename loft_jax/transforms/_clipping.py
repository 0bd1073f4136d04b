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
    compute_dtype,
    factor_frames,
    group_pairs,
    leaves_outside,
    read_arguments,
)


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
            return clipped, _alternation.next_turn(turn, tree, gradients)

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
    for group, frames in zip(groups, factor_frames(groups, params), strict=True):
        h_a, h_b = (
            group.over_batch(coordinates)(factor.tall(gradients), frame)
            for factor, frame in zip((group.a, group.b), reversed(frames), strict=True)
        )
        of_a, of_b = (
            tree.parts(factor.leaves[0]).sum(_sum_of_squares(h))
            for factor, h in ((group.a, h_a), (group.b, h_b))
        )
        if moves_a is not None:
            terms.append(jnp.where(moves_a, of_a, of_b))
        else:
            # |G P_V + P_U G|^2: the inner product of the two is |P_U G P_V|^2.
            shared = group.a.rows.sum(jnp.swapaxes(frames[0].span, -1, -2) @ h_a)
            terms += [of_a, of_b, 2 * group.layers.sum(_sum_of_squares(shared))]
    return jnp.stack(terms).sum() if terms else jnp.zeros([])


def _sum_of_squares(x: jax.Array) -> jax.Array:
    return jnp.sum(x * x)
