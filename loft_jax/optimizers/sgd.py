"""LoFT with momentum: the method of the paper's lemmas."""

from typing import Any, NamedTuple

import jax
import optax

from loft_jax.algorithm.adam import MomentumScalars, as_scalar, first_moment_estimate
from loft_jax.algorithm.momentum import FollowMoment
from loft_jax.algorithm.pair import Blocks, MomentRule
from loft_jax.execution.alternation import FactorName, check_factor_name, first_active
from loft_jax.execution.arguments import gradient_precision, read_state
from loft_jax.execution.groups import compute_dtype
from loft_jax.execution.transformation import Core, as_transformation, descend
from loft_jax.execution.update import LeafStates, Method, check_max_norm, update_leaves, zero_state
from loft_jax.pairs.find import PairedTree

Number = float | jax.Array


class _Hyperparams(NamedTuple):
    """Numbers that may change from step to step."""

    momentum: Number | None
    max_norm: Number | None


class ScaleByLoftMomentumState(NamedTuple):
    """State of `scale_by_loft_momentum`.

    The trees have the structure of the parameters; dtypes are float32, or the parameter's if that
    is wider. Without momentum there is nothing to keep, and both trees are None.

    Attributes:
      active: ``()`` int32, the factor that moves at the next step: 0 for ``b``, 1 for ``a``.
      basis: for a factor its orthonormal basis at the last step, of the factor's shape;
        `optax.MaskedNode` for a non-LoRA parameter.
      mu: the moment, of the parameter's shape, in ``accumulator_dtype``. A factor's is expressed in
        ``basis`` of its partner.
    """

    active: jax.Array
    basis: Any
    mu: Any


def scale_by_loft_momentum(
    momentum: Number | None = 0.9,
    nesterov: bool = False,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
    *,
    alternate: bool = True,
    moves_first: FactorName = "b",
    gradient_dtype: jax.typing.DTypeLike | None = None,
    pairs: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The core of LoFT with momentum, without learning rate, for chaining.

    For the pair :math:`W = W_0 + s U V^\top`, with :math:`sV = Q L^\top` and
    :math:`T = Q_-^\top Q`, the step of :math:`U` is

    .. math::
      h &= \nabla_U f \, L^{-\top} & \text{(block 2)} \\
      M &\leftarrow \mu M T + h & \text{(block 3)} \\
      \Delta U &= M L^{-1}

    so that :math:`s \Delta U V^\top` is the momentum of full fine-tuning, as far as the subspaces
    hold it. Non-LoRA parameters get plain momentum, as from `optax.trace`.

    Args:
      momentum, nesterov, accumulator_dtype: as in `optax.sgd`; the default momentum is 0.9. The
        dtype of the moment is by default that of the computation.
      alternate, moves_first, gradient_dtype, pairs: as in `scale_by_loft_adam`.

    Returns:
      A transformation whose ``update`` needs ``params``. Its updates have the gradients' dtypes.

    Raises:
      ValueError, TypeError: as `scale_by_loft_adam`.

    Source: blocks 1 to 3 of Tastan et al., ICLR 2026, and the LoFT-GD of its appendix B.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"lora_a": jnp.full((3, 1), 10.0), "lora_b": jnp.zeros((1, 2))}
      >>> full = jnp.ones((3, 2))  # gradient of the weight, in the column space of lora_a
      >>> grads = {"lora_a": jnp.zeros((3, 1)), "lora_b": params["lora_a"].T @ full}
      >>> tx = scale_by_loft_momentum()
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> bool(jnp.allclose(params["lora_a"] @ updates["lora_b"], full, atol=1e-5))
      True
    """
    hyperparams = _Hyperparams(momentum, None)
    blocks = Blocks(alternate=alternate, precision=gradient_precision(gradient_dtype))
    core = _momentum_core(hyperparams, nesterov, accumulator_dtype, blocks, moves_first)
    return as_transformation(core, pairs)


def loft_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Number | None = None,
    nesterov: bool = False,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
    *,
    alternate: bool = True,
    moves_first: FactorName = "b",
    max_norm: Number | None = None,
    balance: bool = True,
    gradient_dtype: jax.typing.DTypeLike | None = None,
    pairs: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LoFT with (momentum) gradient descent: the drop-in for `optax.sgd` on adapters.

    The weight moves by :math:`-\eta \, G P_V` and :math:`-\eta \, P_U G` alternately, or by the
    calibrated momentum of these. The learning rate is that of full fine-tuning: no ``|V|²`` is in
    the step, which makes the problem in each factor as smooth as it is in the weight.

    Args:
      learning_rate, momentum, nesterov, accumulator_dtype: as in `optax.sgd`. Under
        `optax.inject_hyperparams` with bfloat16 parameters, pass ``hyperparam_dtype=jnp.float32``
        to it, so that numbers are not rounded to bfloat16.
      alternate, moves_first, gradient_dtype, pairs: as in `scale_by_loft_adam`.
      max_norm: clips the gradients by their projected global norm, as in `loft_adamw`.
      balance: whether the update also keeps the factors balanced, as in `loft_adamw`.

    Returns:
      A transformation whose ``update`` needs ``params``, with the state
      ``(ScaleByLoftMomentumState, empty state, state of the learning rate)``.

    Raises:
      ValueError, TypeError: as `scale_by_loft_adam`.

    Source: appendix B of Tastan et al., ICLR 2026 (LoFT-GD).

    Example:
      On matrix factorization a step of size 1 is alternating least squares (Lemma 2):

      >>> import jax, jax.numpy as jnp, optax
      >>> target = jnp.array([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]])
      >>> loss = lambda p: 0.5 * jnp.sum((p["lora_a"] @ p["lora_b"] - target) ** 2)
      >>> params = {"lora_a": jnp.ones((3, 1)), "lora_b": jnp.zeros((1, 2))}
      >>> tx = loft_sgd(1.0)
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...   updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...   params = optax.apply_updates(params, updates)
      >>> bool(loss(params) < 1e-10)
      True
    """
    hyperparams = _Hyperparams(momentum, max_norm)
    blocks = Blocks(alternate=alternate, precision=gradient_precision(gradient_dtype))
    core = _momentum_core(hyperparams, nesterov, accumulator_dtype, blocks, moves_first)
    return descend(core, learning_rate, pairs, balance=balance)


def _momentum_core(
    hyperparams: _Hyperparams,
    nesterov: bool,
    dtype: jax.typing.DTypeLike | None,
    blocks: Blocks,
    moves_first: FactorName,
) -> Core[ScaleByLoftMomentumState, _Hyperparams]:
    check_factor_name(moves_first)
    check_max_norm(hyperparams.max_norm)
    widths = (lambda m, r: r,)

    def init(tree: PairedTree) -> ScaleByLoftMomentumState:
        if hyperparams.momentum is None:
            return ScaleByLoftMomentumState(first_active(moves_first), None, None)
        trees = map(tree.treedef.unflatten, zero_state(tree, widths, (dtype,)))
        return ScaleByLoftMomentumState(first_active(moves_first), *trees)

    def step(
        hyperparams: _Hyperparams,
        tree: PairedTree,
        gradients: list[Any],
        state: ScaleByLoftMomentumState,
    ) -> tuple[list[Any], ScaleByLoftMomentumState]:
        momentum, max_norm = hyperparams
        if (state.mu is None) != (momentum is None):
            raise ValueError(
                f"The state has {'no' if state.mu is None else 'a'} moment, but momentum is "
                f"{momentum}: make it anew with init"
            )
        before = LeafStates([])
        if momentum is not None:
            basis, mu = read_state(tree, (state.basis, state.mu), widths)
            before = LeafStates(basis, (mu,))

        def rule(dtype: Any) -> MomentRule:
            decay = None if momentum is None else as_scalar(momentum, dtype)
            ahead = (decay, 1.0) if nesterov and decay is not None else None
            return MomentRule(decay, 1.0, None, MomentumScalars(ahead=ahead), FollowMoment())

        def update_other(gradient: jax.Array, *moments: jax.Array) -> tuple[jax.Array, ...]:
            return momentum_of_other(rule(compute_dtype(gradient)), gradient, *moments)

        method = Method(rule, update_other, blocks, max_norm)
        directions, active, after = update_leaves(tree, method, gradients, state.active, before)
        if momentum is None:
            return directions, ScaleByLoftMomentumState(active, None, None)
        basis, mu = map(tree.treedef.unflatten, (after.basis, *after.moments))
        return directions, ScaleByLoftMomentumState(active, basis, mu)

    active = (lambda state: state.active) if blocks.alternate else None
    return Core(ScaleByLoftMomentumState, init, step, hyperparams, active)


def momentum_of_other(
    rule: MomentRule, gradient: jax.Array, *mu: jax.Array
) -> tuple[jax.Array, ...]:
    """Plain momentum for a non-LoRA parameter."""
    if rule.decay is None:
        return (gradient,)
    wide = gradient.astype(compute_dtype(gradient))
    new = rule.decay * mu[0].astype(wide.dtype) + rule.weight * wide
    direction = first_moment_estimate(new, wide, rule.scalars)
    return direction.astype(gradient.dtype), new.astype(mu[0].dtype)
