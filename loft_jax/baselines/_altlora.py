"""AltLoRA and AltLoRA+: alternating projections, with a momentum that is carried along."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from loft_jax._mesh import in_auto_axes
from loft_jax._moments import as_scalar
from loft_jax._pairs import LoraPairs, PairedTree, find_pairs
from loft_jax.baselines._checked import checked
from loft_jax.baselines._matrices import Spectrum, gram_spectra, inverse_gram
from loft_jax.transforms import _alternation
from loft_jax.transforms._descent import descend
from loft_jax.transforms._factors import group_pairs, leaves_like, read_arguments
from loft_jax.transforms._partition import factors_and_rest
from loft_jax.transforms._step import zero_memory


class ScaleByAltLoraState(NamedTuple):
    """State of `scale_by_altlora`. The trees have the structure of the parameters.

    Attributes:
      turn: ``()`` int32, 0 when the factor named by ``moves_first`` moves at the next step, else 1.
      seen: for each factor its value when its partner moved last; `optax.MaskedNode` outside pairs.
      mu: first moment of each leaf, in the coordinates of the raw factors.
      nu: second moment of each leaf; None for AltLoRA, which has none.
    """

    turn: jax.Array
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
    moves_first: _alternation.FactorName = "b",
    pairs: LoraPairs | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The core of AltLoRA (and, with ``b2``, of AltLoRA+), without learning rate, for chaining.

    For :math:`W = W_0 + s U V^\top`, when it is the turn of :math:`U`, with the partner
    :math:`V_-` as it was at the last turn of :math:`U`:

    .. math::
      \tilde g &= s^{-2} \nabla_U f \, (V^\top V + \lambda I)^{-1} \\
      M &\leftarrow \beta_1 M (V_-^\top V)(V^\top V + \lambda I)^{-1} + (1 - \beta_1) \tilde g \\
      S &\leftarrow \beta_2 S + (1 - \beta_2) \tilde g^2 \qquad \text{(AltLoRA+)}

    and the step is :math:`M`, or :math:`M / (\sqrt S + \epsilon)`. Neither corrects bias. The
    moments of the factor that rests do not see the gradient. Leaves outside pairs pass through.

    Args:
      b1: decay rate of the first moment.
      b2: decay rate of the second moment, AltLoRA+'s; None has none.
      eps: added to the denominator, outside the square root.
      damping: :math:`\lambda`, absolute.
      alternate: False moves both factors at every step, from the same point.
      moves_first: the factor that moves first.
      pairs: how to find the pairs; None for the defaults of `LoraPairs`.

    Returns:
      A transformation whose ``update`` needs ``params``.

    Raises:
      ValueError, TypeError: as `scale_by_loft_adam`.

    Source: Yu, Wang, Chen and Xue, "AltLoRA: Towards Better Gradient Approximation in Low-Rank
      Adaptation with Alternating Projections", NeurIPS 2025, Algorithms 1 and 2, damped as in
      their corollaries. The paper is followed: its released script moves both factors at each
      step, leaves out ``s ** -2``, corrects the bias of the first moment alone, and its AltLoRA+
      does not store the carried moment. The printed algorithm starts with ``a``, which at ``b = 0``
      has no gradient; starting with ``b`` is also what its table 9 finds better.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"lora_a": jnp.array([[3.0], [4.0]]), "lora_b": jnp.zeros((1, 2))}
      >>> grads = {"lora_a": jnp.zeros((2, 1)), "lora_b": jnp.array([[25.0, 50.0]])}
      >>> tx = scale_by_altlora(b1=0.5)
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> updates["lora_b"].round(4)
      Array([[0.5, 1. ]], dtype=float32)
    """
    _alternation.check_factor_name(moves_first)
    moments = 1 if b2 is None else 2

    def init(params: optax.Params) -> ScaleByAltLoraState:
        tree = find_pairs(params, pairs)
        memory = zero_memory(tree, [lambda m, r: r] * moments, [None] * moments)
        return _state(tree, jnp.zeros([], jnp.int32), [memory.basis, *memory.moments])

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        tree, gradients = read_arguments(params, updates, pairs)
        fields = [leaves_like(tree, field, "states") for field in state[1 : 2 + moments]]

        def step(params, gradients, turn, fields, hyperparams):
            moves_a = _alternation.a_moves(turn, moves_first)
            moves = (moves_a | (not alternate), ~moves_a | (not alternate))
            directions, fields = _step(tree, params, gradients, fields, moves, hyperparams)
            return directions, _alternation.next_turn(turn, tree, gradients), fields

        directions, turn, fields = in_auto_axes(
            step,
            tree.leaves,
            gradients,
            state.turn,
            fields,
            (b1, b2, eps, damping),
            out_like=(tree.leaves, state.turn, fields),
        )
        return tree.treedef.unflatten(directions), _state(tree, turn, fields)

    return checked(optax.GradientTransformation(init, update), pairs)


def altlora(
    learning_rate: optax.ScalarOrSchedule,
    b1: float | jax.Array = 0.9,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    *,
    damping: float | jax.Array = 1e-6,
    alternate: bool = True,
    moves_first: _alternation.FactorName = "b",
    mask: Any | Callable[[optax.Params], Any] | None = None,
    pairs: LoraPairs | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AltLoRA: alternating projected gradients with a carried momentum.

    Leaves outside pairs get `optax.adam` with the same learning rate and ``b1``.

    Args:
      learning_rate: a number or a schedule; the authors used 1e-2 to 1e-4.
      weight_decay: of the factors: decoupled, times the learning rate.
      mask: a tree of booleans, or a function from parameters to one, of the factors to decay.
      b1, damping, alternate, moves_first, pairs: see `scale_by_altlora`.

    Returns:
      A transformation whose ``update`` needs ``params``. State: moment and snapshot, ``2 r``
      numbers a row.

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
    order = {"alternate": alternate, "moves_first": moves_first, "pairs": pairs}
    core = scale_by_altlora(b1, damping=damping, **order)
    factors = descend(core, learning_rate, weight_decay, mask, **order)
    return factors_and_rest(factors, optax.adam(learning_rate, b1), pairs)


def altlora_plus(
    learning_rate: optax.ScalarOrSchedule,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    *,
    damping: float | jax.Array = 1e-6,
    alternate: bool = True,
    moves_first: _alternation.FactorName = "b",
    mask: Any | Callable[[optax.Params], Any] | None = None,
    pairs: LoraPairs | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AltLoRA+: AltLoRA with a second moment of the factors, which is not carried along.

    Leaves outside pairs get `optax.adam` with the same learning rate, ``b1``, ``b2`` and ``eps``.

    Args:
      learning_rate: a number or a schedule; the authors used 1e-5 to 1e-4. Without correction of
        the bias, first steps are about three times as large.
      weight_decay: of the factors: decoupled, times the learning rate.
      mask: a tree of booleans, or a function from parameters to one, of the factors to decay.
      b1, b2, eps, damping, alternate, moves_first, pairs: see `scale_by_altlora`.

    Returns:
      A transformation whose ``update`` needs ``params``. State: both moments and the snapshot,
      ``3 r`` numbers a row.

    Raises:
      ValueError, TypeError: as `scale_by_loft_adam`.

    Source: see `scale_by_altlora`, Algorithm 2. Its epsilon is not stated; the released script has
      1e-4.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"lora_a": jnp.array([[3.0], [4.0]]), "lora_b": jnp.zeros((1, 1))}
      >>> grads = {"lora_a": jnp.zeros((2, 1)), "lora_b": jnp.array([[25.0]])}
      >>> tx = altlora_plus(0.1)
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> round(float(updates["lora_b"][0, 0]), 4)
      -0.3162
    """
    order = {"alternate": alternate, "moves_first": moves_first, "pairs": pairs}
    core = scale_by_altlora(b1, b2, eps, damping=damping, **order)
    factors = descend(core, learning_rate, weight_decay, mask, **order)
    return factors_and_rest(factors, optax.adam(learning_rate, b1, b2, eps), pairs)


def _state(tree: PairedTree, turn: jax.Array, fields: list[list[Any]]) -> ScaleByAltLoraState:
    seen, mu, *nu = map(tree.treedef.unflatten, fields)
    return ScaleByAltLoraState(turn, seen, mu, nu[0] if nu else None)


@jax.default_matmul_precision("highest")
def _step(
    tree: PairedTree,
    params: list[jax.Array],
    gradients: list[jax.Array],
    fields: list[list[Any]],
    moves: tuple[jax.Array, jax.Array],
    hyperparams: tuple[Any, ...],
) -> tuple[list[jax.Array], list[list[Any]]]:
    directions, (seen, *moments) = list(gradients), fields
    new_seen, *new_moments = [list(field) for field in fields]
    groups = group_pairs(tree)
    grams = iter(gram_spectra([p.tall(params) for group in groups for _, p in group.sides]))
    for group in groups:
        for (factor, partner), turn in zip(group.sides, moves, strict=True):
            side = functools.partial(_side, hyperparams, group.scale)
            old = tuple(factor.tall(moment) for moment in moments)
            point, point_seen = partner.tall(params), partner.tall(seen)
            new, direction = group.over_batch(side)(
                old, factor.tall(gradients), point, point_seen, next(grams)
            )
            factor.put(jnp.where(turn, direction, 0), directions, like=gradients)
            for target, after, before in zip(new_moments, new, old, strict=True):
                factor.put(jnp.where(turn, after, before), target, like=target)
            partner.put(jnp.where(turn, point, point_seen), new_seen, like=seen)
    return directions, [new_seen, *new_moments]


def _side(
    hyperparams: tuple[Any, ...],
    scale: float,
    moments: tuple[Float[Array, "m r"], ...],
    gradient: Float[Array, "m r"],
    partner: Float[Array, "n r"],
    partner_seen: Float[Array, "n r"],
    gram: Spectrum,
) -> tuple[tuple[Float[Array, "m r"], ...], Float[Array, "m r"]]:
    """The moments of a factor and its direction, at its turn."""
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
