"""LoFT-AdamW: the paper's Algorithm 1, written in orthonormal bases."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loft_jax.algorithm.adam import (
    AdamScalars,
    adam_ratio,
    adam_scalars,
    as_scalar,
    first_moment_estimate,
)
from loft_jax.algorithm.pair import Blocks, MomentRule
from loft_jax.algorithm.second_moment import SECOND_MOMENTS, Entrywise, SecondMomentName
from loft_jax.execution.alternation import FactorName, check_factor_name, first_active
from loft_jax.execution.arguments import gradient_precision, read_state
from loft_jax.execution.transformation import Core, as_transformation, descend
from loft_jax.execution.update import LeafStates, Method, check_max_norm, update_leaves, zero_state
from loft_jax.optimizers.options import Options, check_options, make_options
from loft_jax.pairs.find import PairedTree

Number = float | jax.Array


class ScaleByLoftAdamState(NamedTuple):
    """State of `scale_by_loft_adam`. All trees have the structure of the parameters.

    ``r`` below is the rank axis of a factor; where a field has another size than the factor, that
    axis is the one that differs. Dtypes are float32, or the parameter's if that is wider.

    Attributes:
      count: ``()`` int32, steps taken.
      active: ``()`` int32, the factor that moves at the next step: 0 for ``b``, 1 for ``a``.
      basis: for a factor its orthonormal basis at the last step, of the factor's shape (in the
        ablations the factor itself, with its scale); `optax.MaskedNode` for a non-LoRA parameter.
      mu: first moment, of the parameter's shape, in ``mu_dtype``. A factor's is expressed in
        ``basis`` of its partner.
      nu: second moment. Calibrated: ``r (r + 1) / 2`` packed cross terms a row. Factored: the row
        sums and the laid-out Gram matrix, ``1 + ceil(r (r + 1) / 2 / rows)`` a row. Diagonal: one
        number for each of ``mu``. A factor's is in ``nu_dtype``. Of non-LoRA parameters:
        Adam's, of their shape.
      options: the options that the state was made with; no arrays.
    """

    count: jax.Array
    active: jax.Array
    basis: Any
    mu: Any
    nu: Any
    options: Options


class _Hyperparams(NamedTuple):
    """Numbers that may change from step to step."""

    b1: Number
    b2: Number
    eps: Number
    eps_root: Number
    max_norm: Number | None


class _Settings(NamedTuple):
    """Options that are fixed when the optimizer is made."""

    nesterov: bool
    second_moment: SecondMomentName
    blocks: Blocks
    moves_first: FactorName
    mu_dtype: jax.typing.DTypeLike | None
    nu_dtype: jax.typing.DTypeLike | None


def scale_by_loft_adam(
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    eps_root: Number = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    nesterov: bool = False,
    second_moment: SecondMomentName = "calibrated",
    alternate: bool = True,
    scale_gradient: bool = True,
    calibrate: bool = True,
    reconstruct: bool = True,
    moves_first: FactorName = "b",
    nu_dtype: jax.typing.DTypeLike | None = None,
    gradient_dtype: jax.typing.DTypeLike | None = None,
    pairs: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The core of LoFT-AdamW, without learning rate and weight decay, for chaining.

    For the pair :math:`W = W_0 + s U V^\top`, with :math:`sV = Q L^\top` and
    :math:`T = Q_-^\top Q`, the step of :math:`U` is

    .. math::
      h &= \nabla_U f \, L^{-\top} & \text{(block 2)} \\
      M &\leftarrow \beta_1 M T + (1 - \beta_1) h & \text{(block 3)} \\
      P_i &\leftarrow \beta_2 T^\top P_i T + (1 - \beta_2) h_i h_i^\top & \text{(block 4)} \\
      D_{ij} &= \frac{M_i \cdot q_j / (1 - \beta_1^k)}
                     {\sqrt{q_j^\top P_i q_j / (1 - \beta_2^k)} + \epsilon} \\
      \Delta U &= D Q L^{-1} & \text{(block 5)}

    and that of :math:`V` the same with the roles exchanged. The moments of both factors advance at
    every step; the active factor moves (block 1). Non-LoRA parameters get Adam's update.

    Args:
      b1, b2, eps, eps_root, mu_dtype, nesterov: as in `optax.scale_by_adam`. The dtype of the first
        moment is by default that of the computation. Under `optax.inject_hyperparams`, which takes
        a dtype object for a schedule, give its name. With bfloat16 parameters also pass
        ``hyperparam_dtype=jnp.float32`` to it, as for any optimizer: in bfloat16, 0.999 is 1.
      second_moment: "calibrated", the paper's, with ``r (r + 1) / 2`` cross terms a row, exact at
        full rank; "factored", Adafactor's rank-one estimate formed exactly in the basis: about the
        state of LoRA's own AdamW (two numbers a row in place of ``r``, beside ``basis``) and no
        ``m x n`` work; or "diagonal", LoFT (simple): Adam's ratio entry by entry in the basis, with
        ``r`` squares a row that are not calibrated. "diagonal" does no ``m x n`` work either, but
        its steps depend on how ``W`` is factored (up to a rotation of the basis), and it needs ten
        to thirty times the learning rate.
      alternate: False moves both factors from the same point at every step (ablation of block 1).
      scale_gradient: False uses the factor's own gradient as the projected one (ablation of
        block 2).
      calibrate: False leaves the moments in the coordinates of the raw factors (the paper's
        ablation of blocks 3 and 4).
      reconstruct: False takes Adam's ratio entry by entry in the coordinates of the raw factors
        (ablation of block 5). "diagonal" takes it so in either case, in the basis if this is True;
        False is LoFT (simple) as the authors' code has it.
        With these four all False, and "diagonal", LoRA with Adam is left.
      moves_first: the factor that moves first, "a" or "b". Choose the zero-initialized one: the
        other has no gradient until its partner has moved.
      nu_dtype: dtype of the second moments of factors, most of the calibrated state; None for that
        of the computation. "bfloat16" halves it, with stochastic rounding (`nu` would not change
        otherwise).
      gradient_dtype: where factors are not balanced, the dtype of the forward pass, such as
        "bfloat16". Singular values of a factor that may be rounding of such gradients then count as
        zero: less than 2^-8 of the largest in bfloat16, 2^-11 in float16. Dividing by them made the
        partner diverge where rows are few. None, as float32, does nothing.
      pairs: what to look for: a `LoraPairs`, the `LoraRule` or rules that the model was adapted
        with, or None for adapters with standard names and scale 1.

    Returns:
      A transformation whose ``update`` needs ``params``. Its updates have the gradients' dtypes.

    Raises:
      ValueError: an unknown option; no pairs, half pairs or ambiguous ones (see `LoraPairs`);
        gradients of another structure or shape than the parameters; missing ``params``; a state
        made with other options.
      TypeError: a parameter that is not a real floating-point array; ``pairs`` of another type.

    Source: Algorithm 1 of Tastan et al., "LoFT: Low-Rank Adaptation That Behaves Like Full
      Fine-Tuning", ICLR 2026; epsilon outside the square root and the scaled gradient as in block
      2, which makes it AdamW at full rank.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = {"lora_a": jnp.ones((3, 1)), "lora_b": jnp.zeros((1, 2))}
      >>> tx = optax.chain(scale_by_loft_adam(), optax.scale_by_learning_rate(0.1))
      >>> grads = {"lora_a": jnp.zeros((3, 1)), "lora_b": jnp.array([[2.0, -4.0]])}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> bool(jnp.allclose(updates["lora_b"], jnp.array([[-0.1, 0.1]])))  # -0.1 * sign
      True
      >>> bool((updates["lora_a"] == 0).all())
      True
    """
    precision = gradient_precision(gradient_dtype)
    blocks = Blocks(alternate, scale_gradient, calibrate, reconstruct, precision)
    settings = _Settings(nesterov, second_moment, blocks, moves_first, mu_dtype, nu_dtype)
    hyperparams = _Hyperparams(b1, b2, eps, eps_root, None)
    return as_transformation(_adam_core(settings, hyperparams), pairs)


def loft_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    eps_root: Number = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    nesterov: bool = False,
    second_moment: SecondMomentName = "calibrated",
    alternate: bool = True,
    scale_gradient: bool = True,
    calibrate: bool = True,
    reconstruct: bool = True,
    moves_first: FactorName = "b",
    nu_dtype: jax.typing.DTypeLike | None = None,
    max_norm: Number | None = None,
    balance: bool = True,
    gradient_dtype: jax.typing.DTypeLike | None = None,
    pairs: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LoFT-AdamW: low-rank adaptation that follows full fine-tuning with AdamW.

    The drop-in for `optax.adamw` on the adapters of a model, with the same arguments in the same
    order. The active factor, say :math:`U`, moves by :math:`-\eta_k (\Delta U + \lambda U)`, with
    :math:`\Delta U` as in `scale_by_loft_adam`; the other neither moves nor decays.

    Args:
      learning_rate: a number or a schedule of the step. Start at 3x the learning rate you would use
        for full fine-tuning (tested at ranks up to 16; 10x for multiple choice).
      b1, b2, eps, eps_root, mu_dtype, nesterov: as in `optax.adamw`. Under
        `optax.inject_hyperparams` with bfloat16 parameters, pass ``hyperparam_dtype=jnp.float32``
        to it: in bfloat16, 0.999 is 1.
      weight_decay: decoupled, times the learning rate; a number or a schedule. It decays the
        adapter's part of the weight, not the frozen base.
      mask: a tree of booleans, or a function from parameters to one, of what to decay.
      second_moment, alternate, scale_gradient, calibrate, reconstruct: see `scale_by_loft_adam`.
      moves_first, nu_dtype, gradient_dtype, pairs: see `scale_by_loft_adam`.
      max_norm: clips the gradients by the norm that full fine-tuning would see, before the moments
        (block 6, see `clip_by_projected_global_norm`); None does not clip.
      balance: whether the update also keeps the factors balanced (see `balance_factors`): the same
        product, without the cancellation that bfloat16 does not bear. It moves the factor that
        rests too, and also at learning rate zero. Turn it off where something after the optimizer
        scales or drops a part of its updates, or a factor has to stay as it is, and then pass
        ``gradient_dtype``. Without effect in
        ablations and with "diagonal", whose steps depend on the factors.

    Returns:
      A transformation whose ``update`` needs ``params``, with the state ``(ScaleByLoftAdamState,
      state of the weight decay, state of the learning rate)``.

    Raises:
      ValueError, TypeError: as `scale_by_loft_adam`.

    Source: Algorithm 1 of Tastan et al., ICLR 2026.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> target = jnp.outer(jnp.arange(4.0), jnp.array([1.0, -1.0, 2.0]))
      >>> loss = lambda p: jnp.sum((p["lora_a"] @ p["lora_b"] - target) ** 2)
      >>> params = {"lora_a": jnp.ones((4, 1)), "lora_b": jnp.zeros((1, 3))}
      >>> tx = loft_adamw(optax.cosine_decay_schedule(0.2, 200))
      >>> @jax.jit
      ... def step(params, state):
      ...   updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...   return optax.apply_updates(params, updates), state
      >>> state = tx.init(params)
      >>> for _ in range(200):
      ...   params, state = step(params, state)
      >>> bool(loss(params) < 1e-2 * jnp.sum(target**2))
      True
    """
    precision = gradient_precision(gradient_dtype)
    blocks = Blocks(alternate, scale_gradient, calibrate, reconstruct, precision)
    settings = _Settings(nesterov, second_moment, blocks, moves_first, mu_dtype, nu_dtype)
    core = _adam_core(settings, _Hyperparams(b1, b2, eps, eps_root, max_norm))
    # The steps of the others depend on the factors, not on their product alone.
    balance = balance and not blocks.keep_raw and second_moment != "diagonal"
    return descend(
        core, learning_rate, pairs, weight_decay=weight_decay, mask=mask, balance=balance
    )


def _adam_core(
    settings: _Settings, hyperparams: _Hyperparams
) -> Core[ScaleByLoftAdamState, _Hyperparams]:
    if settings.second_moment not in SECOND_MOMENTS:
        names = ", ".join(map(repr, SECOND_MOMENTS))
        raise ValueError(f"second_moment must be one of {names}, got {settings.second_moment!r}")
    check_factor_name(settings.moves_first)
    check_max_norm(hyperparams.max_norm)
    blocks, second = settings.blocks, SECOND_MOMENTS[settings.second_moment]
    if not blocks.reconstruct:
        second = Entrywise(second)
    options = make_options(settings.second_moment, blocks)
    widths = (lambda m, r: r, second.width)

    def init(tree: PairedTree) -> ScaleByLoftAdamState:
        mu_dtype, nu_dtype = settings.mu_dtype, settings.nu_dtype
        leaves = zero_state(tree, widths, (mu_dtype, None), (mu_dtype, nu_dtype))
        basis, mu, nu = map(tree.treedef.unflatten, leaves)
        # Two arrays: a buffer that served twice could not be donated.
        count, active = jnp.zeros([], jnp.int32), first_active(settings.moves_first)
        return ScaleByLoftAdamState(count, active, basis, mu, nu, options)

    def step(
        hyperparams: _Hyperparams,
        tree: PairedTree,
        gradients: list[Any],
        state: ScaleByLoftAdamState,
    ) -> tuple[list[Any], ScaleByLoftAdamState]:
        b1, b2, eps, eps_root, max_norm = hyperparams
        check_options(state.options, options)
        basis, *moments = read_state(tree, (state.basis, state.mu, state.nu), widths)
        count = jnp.asarray(optax.safe_increment(state.count))

        def scalars(dtype: jnp.dtype) -> AdamScalars:
            nesterov = settings.nesterov
            return adam_scalars(count, b1, b2, eps, dtype, eps_root=eps_root, nesterov=nesterov)

        def rule(dtype: jnp.dtype) -> MomentRule:
            decay = as_scalar(b1, dtype)
            return MomentRule(decay, 1 - decay, as_scalar(b2, dtype), scalars(dtype), second)

        def update_other(
            gradient: jax.Array, mu: jax.Array, nu: jax.Array
        ) -> tuple[jax.Array, ...]:
            return _adam(b1, b2, scalars(nu.dtype), gradient, mu, nu)

        method = Method(rule, update_other, blocks, max_norm, count)
        before = LeafStates(basis, tuple(moments))
        directions, active, after = update_leaves(tree, method, gradients, state.active, before)
        basis, mu, nu = map(tree.treedef.unflatten, (after.basis, *after.moments))
        return directions, ScaleByLoftAdamState(count, active, basis, mu, nu, options)

    active = (lambda state: state.active) if blocks.alternate else None
    return Core(ScaleByLoftAdamState, init, step, hyperparams, active)


def _adam(
    b1: Number,
    b2: Number,
    scalars: AdamScalars,
    gradient: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adam's own direction and moments, for a non-LoRA parameter."""
    g = gradient.astype(nu.dtype)
    b1, b2 = as_scalar(b1, nu.dtype), as_scalar(b2, nu.dtype)
    first = b1 * mu.astype(nu.dtype) + (1 - b1) * g
    nu = b2 * nu + (1 - b2) * g * g
    m_hat = first_moment_estimate(first, g, scalars)
    direction = adam_ratio(m_hat, nu / scalars.correction2, scalars)
    return direction.astype(gradient.dtype), first.astype(mu.dtype), nu
