"""AltLoRA and AltLoRA+: alternating projections, with momentum calibrated to the subspace."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from loft_jax.algorithm.adam import as_scalar
from loft_jax.baselines._matrices import Spectrum, gram_spectra, inverse_gram
from loft_jax.execution.alternation import (
    A_IS_ACTIVE,
    FactorName,
    check_factor_name,
    first_active,
    next_active,
)
from loft_jax.execution.arguments import read_state
from loft_jax.execution.groups import Group, group_pairs
from loft_jax.execution.transformation import Core, as_transformation, descend
from loft_jax.execution.update import zero_state
from loft_jax.pairs.find import PairedTree


class ScaleByAltLoraState(NamedTuple):
    """State of `scale_by_altlora`. The trees have the structure of the parameters.

    Attributes:
      active: ``()`` int32, the active factor of the next step: 0 for ``b``, 1 for ``a``.
      seen: the value of each factor at the last step with its partner active; `optax.MaskedNode`
        for a non-LoRA parameter.
      mu: first moment of each leaf, in the coordinates of the raw factors.
      nu: second moment of each leaf; None for AltLoRA, which has no second moment.
    """

    active: jax.Array
    seen: Any
    mu: Any
    nu: Any


def scale_by_altlora(
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array | None = None,
    eps: float | jax.Array = 1e-8,
    *,
    damping: float | jax.Array = 1e-6,
    alternate: bool = True,
    moves_first: FactorName = "b",
    pairs: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The core of AltLoRA (and, with ``b2``, of AltLoRA+), without learning rate, for chaining.

    For :math:`W = W_0 + s U V^\top`, when :math:`U` is active and :math:`V_-` is the partner at the
    last step with :math:`U` active:

    .. math::
      \tilde g &= s^{-2} \nabla_U f \, (V^\top V + \lambda I)^{-1} \\
      M &\leftarrow \beta_1 M (V_-^\top V)(V^\top V + \lambda I)^{-1} + (1 - \beta_1) \tilde g \\
      S &\leftarrow \beta_2 S + (1 - \beta_2) \tilde g^2 \qquad \text{(AltLoRA+)}

    and the step is :math:`M`, or :math:`M / (\sqrt S + \epsilon)`. Neither uses bias correction.
    The moments of the inactive factor are not updated. Updates of non-LoRA parameters are
    unchanged.

    Args:
      b1: decay rate of the first moment.
      b2: decay rate of the second moment of AltLoRA+; None, the default, for no second moment,
        where Optax's default is 0.999.
      eps: added to the denominator, outside the square root.
      damping: :math:`\lambda`, absolute.
      alternate: False updates both factors at every step, from the same point.
      moves_first: the factor that is active first.
      pairs: the LoRA pairs, as in `scale_by_loft_adam`.

    Returns:
      A transformation whose ``update`` needs ``params``.

    Raises:
      ValueError, TypeError: as `scale_by_loft_adam`.

    Source: Yu, Wang, Chen and Xue, "AltLoRA: Towards Better Gradient Approximation in Low-Rank
      Adaptation with Alternating Projections", NeurIPS 2025, Algorithms 1 and 2, damped as in
      their corollaries. This function follows the paper. The released script instead updates both
      factors at each step, omits ``s ** -2``, corrects the bias of the first moment only, and its
      AltLoRA+ does not store the calibrated moment. The printed algorithm starts with ``a``, which
      at ``b = 0`` has no gradient; starting with ``b`` is also better in the paper's table 9.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"lora_a": jnp.array([[3.0], [4.0]]), "lora_b": jnp.zeros((1, 2))}
      >>> grads = {"lora_a": jnp.zeros((2, 1)), "lora_b": jnp.array([[25.0, 50.0]])}
      >>> tx = scale_by_altlora(b1=0.5)
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> updates["lora_b"].round(4)
      Array([[0.5, 1. ]], dtype=float32)
    """
    hyperparams = _Hyperparams(b1, b2, eps, damping)
    return as_transformation(_altlora_core(hyperparams, alternate, moves_first), pairs)


def altlora(
    learning_rate: optax.ScalarOrSchedule,
    b1: float | jax.Array = 0.9,
    *,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    damping: float | jax.Array = 1e-6,
    alternate: bool = True,
    moves_first: FactorName = "b",
    pairs: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """AltLoRA: alternating projected gradients with calibrated momentum.

    Non-LoRA parameters get `optax.adam` with the same learning rate and ``b1``.

    Args:
      learning_rate: a number or a schedule; the authors used 1e-2 to 1e-4.
      weight_decay: of the factors; decoupled, and multiplied by the learning rate.
      mask: a tree of booleans, or a function from parameters to one, of the factors to decay.
      b1, damping, alternate, moves_first, pairs: see `scale_by_altlora`.

    Returns:
      A transformation whose ``update`` needs ``params``. State: moment and snapshot, ``2 r``
      numbers per row.

    Raises:
      ValueError, TypeError: as `scale_by_loft_adam`.

    Source: see `scale_by_altlora`, Algorithm 1.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"lora_a": jnp.array([[3.0], [4.0]]), "lora_b": jnp.zeros((1, 1))}
      >>> grads = {"lora_a": jnp.zeros((2, 1)), "lora_b": jnp.array([[25.0]])}
      >>> tx = altlora(0.1)
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> round(float(updates["lora_b"][0, 0]), 4)
      -0.01
    """
    core = _altlora_core(_Hyperparams(b1, None, 0.0, damping), alternate, moves_first)
    return descend(
        core,
        learning_rate,
        pairs,
        weight_decay=weight_decay,
        mask=mask,
        others=optax.adam(learning_rate, b1),
    )


def altlora_plus(
    learning_rate: optax.ScalarOrSchedule,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    *,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    damping: float | jax.Array = 1e-6,
    alternate: bool = True,
    moves_first: FactorName = "b",
    pairs: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """AltLoRA+: AltLoRA with a second moment of the factors, which is not calibrated.

    Non-LoRA parameters get `optax.adam` with the same learning rate, ``b1``, ``b2`` and ``eps``.

    Args:
      learning_rate: a number or a schedule; the authors used 1e-5 to 1e-4. Without bias
        correction, the first steps are about three times as large.
      weight_decay: of the factors; decoupled, and multiplied by the learning rate.
      mask: a tree of booleans, or a function from parameters to one, of the factors to decay.
      b1, b2, eps, damping, alternate, moves_first, pairs: see `scale_by_altlora`.

    Returns:
      A transformation whose ``update`` needs ``params``. State: both moments and the snapshot,
      ``3 r`` numbers per row.

    Raises:
      ValueError, TypeError: as `scale_by_loft_adam`.

    Source: see `scale_by_altlora`, Algorithm 2. The paper does not state epsilon; the released
      script uses 1e-4.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"lora_a": jnp.array([[3.0], [4.0]]), "lora_b": jnp.zeros((1, 1))}
      >>> grads = {"lora_a": jnp.zeros((2, 1)), "lora_b": jnp.array([[25.0]])}
      >>> tx = altlora_plus(0.1)
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> round(float(updates["lora_b"][0, 0]), 4)
      -0.3162
    """
    core = _altlora_core(_Hyperparams(b1, b2, eps, damping), alternate, moves_first)
    return descend(
        core,
        learning_rate,
        pairs,
        weight_decay=weight_decay,
        mask=mask,
        others=optax.adam(learning_rate, b1, b2, eps),
    )


class _Hyperparams(NamedTuple):
    """Numbers that may change from step to step; without ``b2`` there is no second moment."""

    b1: float | jax.Array
    b2: float | jax.Array | None
    eps: float | jax.Array
    damping: float | jax.Array


def _altlora_core(
    hyperparams: _Hyperparams, alternate: bool, moves_first: FactorName
) -> Core[ScaleByAltLoraState, _Hyperparams]:
    check_factor_name(moves_first)
    moments = 1 if hyperparams.b2 is None else 2

    def init(tree: PairedTree) -> ScaleByAltLoraState:
        seen, *kept = zero_state(tree, [lambda m, r: r] * moments, [None] * moments)
        return _state(tree, first_active(moves_first), [seen, *kept])

    @jax.default_matmul_precision("highest")
    def step(
        hyperparams: _Hyperparams,
        tree: PairedTree,
        gradients: list[Any],
        state: ScaleByAltLoraState,
    ) -> tuple[list[Any], ScaleByAltLoraState]:
        kept = (state.seen, state.mu, state.nu)[: 1 + moments]
        fields = read_state(tree, kept, [lambda m, r: r] * moments)
        a_is_active = state.active == A_IS_ACTIVE
        moves = (a_is_active | (not alternate), ~a_is_active | (not alternate))
        groups = group_pairs(tree)
        directions, fields = _step(groups, tree.leaves, gradients, fields, moves, hyperparams)
        stacks = [group.stack(gradients) for group in groups]
        active = next_active(state.active, tree, groups, stacks)
        return directions, _state(tree, active, fields)

    active = (lambda state: state.active) if alternate else None
    return Core(ScaleByAltLoraState, init, step, hyperparams, active, sharded=False)


def _state(tree: PairedTree, active: jax.Array, fields: list[list[Any]]) -> ScaleByAltLoraState:
    seen, mu, *nu = map(tree.treedef.unflatten, fields)
    return ScaleByAltLoraState(active, seen, mu, nu[0] if nu else None)


def _step(
    groups: list[Group],
    params: list[jax.Array],
    gradients: list[jax.Array],
    fields: list[list[Any]],
    moves: tuple[jax.Array, jax.Array],
    hyperparams: _Hyperparams,
) -> tuple[list[jax.Array], list[list[Any]]]:
    directions, (seen, *moments) = list(gradients), fields
    new_seen, *new_moments = [list(field) for field in fields]
    partners = [group.matrices(name, params) for group in groups for name in "ba"]
    spectra = iter(zip(partners, gram_spectra(partners), strict=True))
    for group in groups:
        of_pair = group.kind.over_batch(
            functools.partial(_moments_and_direction, hyperparams, group.kind.scale)
        )
        for (own, partner), active in zip(("ab", "ba"), moves, strict=True):
            old = tuple(group.matrices(own, moment) for moment in moments)
            point, gram = next(spectra)
            point_seen = group.matrices(partner, seen)
            new, direction = of_pair(old, group.matrices(own, gradients), point, point_seen, gram)
            group.put_matrices(own, jnp.where(active, direction, 0), directions, gradients)
            for target, after, before in zip(new_moments, new, old, strict=True):
                group.put_matrices(own, jnp.where(active, after, before), target, target)
            group.put_matrices(partner, jnp.where(active, point, point_seen), new_seen, seen)
    return directions, [new_seen, *new_moments]


def _moments_and_direction(
    hyperparams: _Hyperparams,
    scale: float,
    moments: tuple[Float[Array, "m r"], ...],
    gradient: Float[Array, "m r"],
    partner: Float[Array, "n r"],
    partner_seen: Float[Array, "n r"],
    gram: Spectrum,
) -> tuple[tuple[Float[Array, "m r"], ...], Float[Array, "m r"]]:
    """Returns the moments of the active factor and its direction."""
    b1, b2, eps, damping = hyperparams
    b1, eps, damping = (as_scalar(x, gradient.dtype) for x in (b1, eps, damping))
    inverse = inverse_gram(gram, damping)
    g = gradient @ inverse / scale / scale
    mu = b1 * (moments[0] @ (partner_seen.T @ partner @ inverse)) + (1 - b1) * g
    if b2 is None:
        return (mu,), mu
    b2 = as_scalar(b2, gradient.dtype)
    nu = b2 * moments[1] + (1 - b2) * g * g
    denominator = jnp.sqrt(nu) + eps
    return (mu, nu), mu / jnp.where(denominator > 0, denominator, 1)
