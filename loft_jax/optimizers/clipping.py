"""Clipping by the norm that full fine-tuning would see (block 6), as its own transformation."""

from typing import Any, NamedTuple

import jax
import optax

from loft_jax.algorithm.pair import Blocks
from loft_jax.execution.alternation import (
    A_IS_ACTIVE,
    FactorName,
    check_factor_name,
    first_active,
    next_active,
)
from loft_jax.execution.bases import group_bases
from loft_jax.execution.groups import group_pairs, opaque_indices
from loft_jax.execution.transformation import Core, as_transformation
from loft_jax.execution.update import check_max_norm, clip_gradients
from loft_jax.pairs.find import PairedTree


class ClipByProjectedGlobalNormState(NamedTuple):
    """State of `clip_by_projected_global_norm`.

    Attributes:
      active: ``()`` int32, the factor that moves at the next step: 0 for ``b``, 1 for ``a``.
    """

    active: jax.Array


def clip_by_projected_global_norm(
    max_norm: float | jax.Array,
    *,
    alternate: bool = True,
    moves_first: FactorName = "b",
    pairs: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips gradients by the norm of the full gradient's projection.

    The gradient of a factor depends on the size of its partner. Full fine-tuning would clip by
    :math:`\|G P_V\|_F`, for the active factor, and that is the norm of the projected gradient in
    the basis, with nothing ``m x n`` formed. Where both factors move it is the norm of
    :math:`G P_V + P_U G`. All pairs and, as they are, the leaves outside them add up to one global
    norm, and all gradients are scaled by ``min(1, max_norm / norm)``.

    The optimizers' own ``max_norm`` does the same and computes the bases only once; prefer it.
    Chain this transformation directly before an optimizer, inside the same wrappers
    (`optax.MultiSteps`, `optax.apply_if_finite`), with the same ``alternate``, ``moves_first`` and
    ``pairs``, so that both have the same active factor.

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
    check_factor_name(moves_first)
    check_max_norm(max_norm)

    def init(tree: PairedTree) -> ClipByProjectedGlobalNormState:
        return ClipByProjectedGlobalNormState(first_active(moves_first))

    @jax.default_matmul_precision("highest")
    def step(
        max_norm: Any, tree: PairedTree, gradients: list[Any], state: Any
    ) -> tuple[list[Any], ClipByProjectedGlobalNormState]:
        groups = group_pairs(tree)
        stacks = [group.stack(tree.leaves) for group in groups]
        indices = opaque_indices(groups, state.active)
        bases = group_bases(groups, stacks, None, Blocks(), indices)
        a_is_active = state.active == A_IS_ACTIVE if alternate else None
        clipped = clip_gradients(tree, groups, gradients, bases, a_is_active, max_norm)
        # As the optimizer behind it sees them: an infinite norm clips all gradients to zero.
        stacks = [group.stack(clipped) for group in groups]
        active = next_active(state.active, tree, groups, stacks)
        return clipped, ClipByProjectedGlobalNormState(active)

    return as_transformation(Core(init, step, max_norm), pairs)
