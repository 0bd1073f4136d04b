"""LoFT-Muon: the paper's Algorithm 5, in the orthonormal basis, with its learning rate."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loft_jax.algorithm.adam import MomentumScalars, as_scalar, one_minus_power
from loft_jax.algorithm.momentum import OrthogonalizeMoment
from loft_jax.algorithm.newton_schulz import Coefficients
from loft_jax.algorithm.pair import Blocks, MomentRule
from loft_jax.execution.alternation import FactorName, check_factor_name, first_active
from loft_jax.execution.arguments import gradient_precision, read_state
from loft_jax.execution.groups import compute_dtype
from loft_jax.execution.transformation import Core, as_transformation, descend
from loft_jax.execution.update import LeafStates, Method, check_max_norm, update_leaves, zero_state
from loft_jax.optimizers.sgd import momentum_of_other
from loft_jax.pairs.find import PairedTree

Number = float | jax.Array
QUINTIC: Coefficients = (3.4445, -4.7750, 2.0315)


class ScaleByLoftMuonState(NamedTuple):
    """State of `scale_by_loft_muon`.

    The trees have the structure of the parameters; dtypes are float32, or the parameter's if that
    is wider.

    Attributes:
      count: ``()`` int32, steps taken.
      active: ``()`` int32, the factor that moves at the next step: 0 for ``b``, 1 for ``a``.
      basis: for a factor its orthonormal basis at the last step, of the factor's shape;
        `optax.MaskedNode` for a non-LoRA parameter.
      mu: the moment, of the parameter's shape, in ``mu_dtype``. A factor's is expressed in
        ``basis`` of its partner. In `loft_muon` `optax.MaskedNode` for a non-LoRA parameter.
    """

    count: jax.Array
    active: jax.Array
    basis: Any
    mu: Any


class _Hyperparams(NamedTuple):
    """Numbers that may change from step to step."""

    ns_coeffs: Coefficients
    ns_steps: int | jax.Array
    beta: Number
    eps: Number
    consistent_rms: Number | None
    max_norm: Number | None


class _Settings(NamedTuple):
    """Options that are fixed when the optimizer is made."""

    mu_dtype: jax.typing.DTypeLike | None
    nesterov: bool
    blocks: Blocks
    moves_first: FactorName
    trains_others: bool


def scale_by_loft_muon(
    ns_coeffs: Coefficients = QUINTIC,
    ns_steps: int | jax.Array = 5,
    beta: Number = 0.95,
    eps: Number = 1e-7,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    nesterov: bool = False,
    consistent_rms: Number | None = None,
    alternate: bool = True,
    moves_first: FactorName = "b",
    gradient_dtype: jax.typing.DTypeLike | None = None,
    pairs: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The core of LoFT-Muon, without learning rate and weight decay, for chaining.

    For the pair :math:`W = W_0 + s U V^\top`, with :math:`sV = Q L^\top` and
    :math:`T = Q_-^\top Q`, the step of :math:`U` is

    .. math::
      M &\leftarrow \beta M T + \nabla_U f \, L^{-\top} \\
      \Delta U &= \mathrm{NewtonSchulz}(M) \, L^{-1}

    which orthogonalizes the full moment :math:`M Q^\top` at the cost of an ``m x r`` matrix: the
    columns of :math:`Q` are orthonormal, so the iteration on :math:`M` is the dense one. State: the
    basis and the moment, ``2 r`` numbers a row.

    Non-LoRA parameters get the momentum without orthogonalization. `loft_muon` gives them AdamW;
    in a chain of your own give them theirs with `optax.partition`.

    Args:
      ns_coeffs, ns_steps, beta, mu_dtype: as in `optax.contrib.scale_by_muon`; the coefficients are
        one triple. The dtype of the moment is by default that of the computation.
      eps: added to the norm that starts the iteration. The paper's default is 1e-7, Optax's 1e-8.
      nesterov: as in `optax.contrib.scale_by_muon`, with its bias corrections. The paper's default
        is False, Optax's True.
      consistent_rms: None moves by the orthogonalized moment as it is, as Algorithm 5 prints; a
        number (such as 0.2) scales it by ``sqrt(max(m, n)) * consistent_rms``, as
        `optax.contrib.muon` does, so that learning rates of AdamW apply. Where that is None Optax
        scales by the shape of the weight, and the paper does not.
      alternate, moves_first, gradient_dtype, pairs: as in `scale_by_loft_adam`.

    Returns:
      A transformation whose ``update`` needs ``params``, with a `ScaleByLoftMuonState`.

    Raises:
      ValueError, TypeError: as `scale_by_loft_adam`.

    Source: Algorithms 3 to 5 of Tastan et al., ICLR 2026.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"lora_a": jnp.eye(3), "lora_b": jnp.zeros((3, 3))}  # full rank: Muon itself
      >>> grads = {"lora_a": jnp.zeros((3, 3)), "lora_b": jnp.diag(jnp.array([3.0, -2.0, 1.0]))}
      >>> tx = scale_by_loft_muon(ns_steps=30, ns_coeffs=(1.5, -0.5, 0.0))
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> jnp.diagonal(updates["lora_b"]).round(3)
      Array([ 1., -1.,  1.], dtype=float32)
    """
    blocks = Blocks(alternate=alternate, precision=gradient_precision(gradient_dtype))
    settings = _Settings(mu_dtype, nesterov, blocks, moves_first, trains_others=True)
    hyperparams = _Hyperparams(ns_coeffs, ns_steps, beta, eps, consistent_rms, None)
    return as_transformation(_muon_core(settings, hyperparams), pairs)


def loft_muon(
    learning_rate: optax.ScalarOrSchedule,
    ns_coeffs: Coefficients = QUINTIC,
    ns_steps: int | jax.Array = 5,
    beta: Number = 0.95,
    eps: Number = 1e-7,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    nesterov: bool = False,
    adam_b1: Number = 0.9,
    adam_b2: Number = 0.999,
    adam_eps: Number = 1e-8,
    adam_eps_root: Number = 0.0,
    adam_weight_decay: Number = 0.0,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    consistent_rms: Number | None = None,
    alternate: bool = True,
    moves_first: FactorName = "b",
    max_norm: Number | None = None,
    balance: bool = True,
    gradient_dtype: jax.typing.DTypeLike | None = None,
    pairs: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LoFT-Muon: low-rank adaptation that follows full fine-tuning with Muon.

    The counterpart of `optax.contrib.muon`, with its positional arguments in the same order. The
    active factor, say :math:`U`, moves by :math:`-\eta_k (\Delta U + \lambda U)` with
    :math:`\Delta U` as in `scale_by_loft_muon`; the other neither moves nor decays. At full
    rank it is Muon. Non-LoRA parameters get `optax.adamw`.

    Args:
      learning_rate: a number or a schedule of the step.
      ns_coeffs, ns_steps, beta, eps, mu_dtype, nesterov, consistent_rms: see `scale_by_loft_muon`,
        also for where the paper's defaults differ from Optax's. Under `optax.inject_hyperparams`
        with bfloat16 parameters, pass ``hyperparam_dtype=jnp.float32`` to it: in bfloat16, 0.999 is
        1.
      weight_decay: of the factors: decoupled, times the learning rate; a number or a schedule.
      weight_decay_mask: a tree of booleans, or a function from parameters to one, of the factors to
        decay.
      adam_b1, adam_b2, adam_eps, adam_eps_root, adam_weight_decay: of non-LoRA parameters. Their
        `optax.adamw` keeps its moments in their dtype and takes ``nesterov``, as in Optax.
      adam_learning_rate: theirs; None for ``learning_rate``.
      alternate, moves_first, gradient_dtype, pairs: as in `scale_by_loft_adam`.
      max_norm: clips the gradients by their projected global norm, as in `loft_adamw`.
      balance: whether the update also keeps the factors balanced, as in `loft_adamw`.

    Returns:
      A transformation whose ``update`` needs ``params``, with the state ``(ScaleByLoftMuonState,
      state of the weight decay, state of the learning rate, state of AdamW)``.

    Raises:
      ValueError, TypeError: as `scale_by_loft_adam`.

    Source: Algorithm 5 of Tastan et al., ICLR 2026, with the learning rate that its lines 17 to 22
      leave out.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> target = jnp.outer(jnp.arange(4.0), jnp.array([1.0, -1.0, 2.0]))
      >>> loss = lambda p: jnp.sum((p["lora_a"] @ p["lora_b"] - target) ** 2)
      >>> params = {"lora_a": jnp.ones((4, 1)), "lora_b": jnp.zeros((1, 3))}
      >>> tx = loft_muon(optax.linear_schedule(0.5, 0.0, 100))
      >>> @jax.jit
      ... def step(params, state):
      ...   updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...   return optax.apply_updates(params, updates), state
      >>> state = tx.init(params)
      >>> for _ in range(100):
      ...   params, state = step(params, state)
      >>> bool(loss(params) < 1e-2 * jnp.sum(target**2))
      True
    """
    blocks = Blocks(alternate=alternate, precision=gradient_precision(gradient_dtype))
    settings = _Settings(mu_dtype, nesterov, blocks, moves_first, trains_others=False)
    hyperparams = _Hyperparams(ns_coeffs, ns_steps, beta, eps, consistent_rms, max_norm)
    adamw = optax.adamw(
        learning_rate if adam_learning_rate is None else adam_learning_rate,
        adam_b1,
        adam_b2,
        adam_eps,
        adam_eps_root,
        weight_decay=adam_weight_decay,
        nesterov=nesterov,
    )
    return descend(
        _muon_core(settings, hyperparams),
        learning_rate,
        pairs,
        weight_decay=weight_decay,
        mask=weight_decay_mask,
        balance=balance,
        others=adamw,
    )


def _muon_core(
    settings: _Settings, hyperparams: _Hyperparams
) -> Core[ScaleByLoftMuonState, _Hyperparams]:
    check_factor_name(settings.moves_first)
    check_max_norm(hyperparams.max_norm)
    widths, blocks = (lambda m, r: r,), settings.blocks

    def init(tree: PairedTree) -> ScaleByLoftMuonState:
        basis, mu = zero_state(tree, widths, (settings.mu_dtype,))
        if not settings.trains_others:
            mu = [basis[k] if k in set(tree.others) else x for k, x in enumerate(mu)]
        trees = map(tree.treedef.unflatten, (basis, mu))
        return ScaleByLoftMuonState(
            jnp.zeros([], jnp.int32), first_active(settings.moves_first), *trees
        )

    def step(
        hyperparams: _Hyperparams,
        tree: PairedTree,
        gradients: list[Any],
        state: ScaleByLoftMuonState,
    ) -> tuple[list[Any], ScaleByLoftMuonState]:
        coeffs, steps, beta, eps, rms, max_norm = hyperparams
        fields = (state.basis, state.mu)
        basis, mu = read_state(tree, fields, widths, others=settings.trains_others)
        count = jnp.asarray(optax.safe_increment(state.count))

        def rule(dtype: Any) -> MomentRule:
            decay, ahead = as_scalar(beta, dtype), None
            if settings.nesterov:
                k = jnp.asarray(count, dtype)
                ahead = decay / one_minus_power(decay, k + 1), 1 / one_minus_power(decay, k)
            direction = OrthogonalizeMoment(steps, coeffs, eps, rms)
            return MomentRule(decay, 1.0, None, MomentumScalars(ahead=ahead), direction)

        def update_other(gradient: jax.Array, mu: Any) -> tuple[Any, ...]:
            if not settings.trains_others:
                return gradient, mu
            return momentum_of_other(rule(compute_dtype(gradient)), gradient, mu)

        method, before = Method(rule, update_other, blocks, max_norm), LeafStates(basis, (mu,))
        directions, active, after = update_leaves(tree, method, gradients, state.active, before)
        basis, mu = map(tree.treedef.unflatten, (after.basis, *after.moments))
        return directions, ScaleByLoftMuonState(count, active, basis, mu)

    active = (lambda state: state.active) if blocks.alternate else None
    return Core(ScaleByLoftMuonState, init, step, hyperparams, active)
