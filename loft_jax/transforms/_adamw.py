"""LoFT-AdamW: the paper's Algorithm 1, written in orthonormal bases."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from loft_jax._mesh import in_auto_axes
from loft_jax._pairs import LoraPairs, find_pairs
from loft_jax._side import SECOND_MOMENTS
from loft_jax.transforms import _alternation
from loft_jax.transforms._adam_step import ScaleByLoftAdamState, loft_adam_step
from loft_jax.transforms._descent import descend
from loft_jax.transforms._factors import check_state, leaves_like, read_arguments
from loft_jax.transforms._step import Blocks, zero_memory

SecondMomentName = Literal["calibrated", "factored", "diagonal"]


def scale_by_loft_adam(
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    *,
    second_moment: SecondMomentName = "calibrated",
    calibrate: bool = True,
    alternate: bool = True,
    scale_gradient: bool = True,
    reconstruct: bool = True,
    moves_first: _alternation.FactorName = "b",
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
    pairs: LoraPairs | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The core of LoFT-AdamW, without learning rate and weight decay, for chaining.

    For the pair :math:`W = W_0 + s U V^\top`, with :math:`sV = Q L^\top` and
    :math:`T = Q_-^\top Q`, the side of :math:`U` is

    .. math::
      h &= \nabla_U f \, L^{-\top} & \text{(block 2)} \\
      M &\leftarrow \beta_1 M T + (1 - \beta_1) h & \text{(block 3)} \\
      P_i &\leftarrow \beta_2 T^\top P_i T + (1 - \beta_2) h_i h_i^\top & \text{(block 4)} \\
      D_{ij} &= \frac{M_i \cdot q_j / (1 - \beta_1^k)}
                     {\sqrt{q_j^\top P_i q_j / (1 - \beta_2^k)} + \epsilon} \\
      \Delta U &= D Q L^{-1} & \text{(block 5)}

    and that of :math:`V` the same with the roles exchanged. Both sides' moments advance at every
    step; the factor whose turn it is moves (block 1). Leaves outside pairs get Adam's update.

    Args:
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added to the denominator, outside the square root.
      second_moment: "calibrated", the paper's, with ``r (r + 1) / 2`` cross terms a row;
        "factored", Adafactor's rank-one estimate formed exactly in the basis: about the state of
        LoRA's own AdamW (two numbers a row in place of ``r``, beside ``basis``) and no ``m x n``
        work; or "diagonal", LoFT (simple): Adam's ratio entry by entry in the basis, with ``r``
        squares a row that are not calibrated. No ``m x n`` work either, but its steps depend on how
        ``W`` is factored (up to a rotation of the basis), and it wants ten to thirty times the
        learning rate.
      calibrate: False leaves the moments in the coordinates of the raw factors (the paper's
        ablation of blocks 3 and 4).
      alternate: False moves both factors from the same point at every step (ablation of block 1).
      scale_gradient: False takes the factor's own gradient for the projected one (ablation of
        block 2).
      reconstruct: False takes Adam's ratio entry by entry in the coordinates of the raw factors
        (ablation of block 5). "diagonal" takes it so in either case, in the basis if this is True;
        False is LoFT (simple) as the authors' code has it.
        With these four all False, and "diagonal", what is left is LoRA with Adam.
      moves_first: the factor that moves first, "a" or "b". Choose the zero-initialised one: the
        other has no gradient until its partner has moved.
      mu_dtype: dtype of the first moment's state; None for the dtype of the computation. Under
        `optax.inject_hyperparams`, which takes a dtype object for a schedule, give its name (and
        there, with bfloat16 parameters, ``hyperparam_dtype=jnp.float32``, as for any optimizer).
      nu_dtype: dtype of the second moments of factors, most of the calibrated state; None for that
        of the computation. "bfloat16" halves it, rounded up or down by chance (`nu` would not move
        else).
      pairs: how to find the pairs; None for the defaults of `LoraPairs`.

    Returns:
      A transformation whose ``update`` needs ``params``. Its updates have the gradients' dtypes.

    Raises:
      ValueError: an unknown option; no pairs, half pairs or ambiguous ones (see `LoraPairs`);
        gradients of another structure or shape than the parameters; missing ``params``.
      TypeError: a parameter that is no real floating-point array.

    Source: Algorithm 1 of Tastan et al., "LoFT: Low-Rank Adaptation That Behaves Like Full
      Fine-Tuning", ICLR 2026; epsilon outside the square root and the scaled gradient as in block
      2, which is what makes it AdamW at full rank.

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
    if second_moment not in tuple(SECOND_MOMENTS):
        names = ", ".join(map(repr, SECOND_MOMENTS))
        raise ValueError(f"second_moment must be one of {names}, got {second_moment!r}")
    _alternation.check_factor_name(moves_first)
    second = SECOND_MOMENTS[second_moment]
    blocks = Blocks(alternate, scale_gradient, calibrate, reconstruct, moves_first)
    widths = (lambda m, r: r, second.width)

    def init(params: optax.Params) -> ScaleByLoftAdamState:
        tree = find_pairs(params, pairs)
        memory = zero_memory(tree, widths, (mu_dtype, None), (mu_dtype, nu_dtype))
        trees = map(tree.treedef.unflatten, (memory.basis, *memory.moments))
        # Two arrays: a buffer that served twice could not be donated.
        return ScaleByLoftAdamState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32), *trees)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        tree, gradients = read_arguments(params, updates, pairs, parts=True)
        trees = (state.basis, state.mu, state.nu)
        fields = (leaves_like(tree, field, "states") for field in trees)
        before = ScaleByLoftAdamState(state.count, state.turn, *fields)
        check_state(tree, before.basis, (before.mu, before.nu), widths)
        directions, after = in_auto_axes(
            functools.partial(loft_adam_step, tree, blocks, second),
            tree.leaves,
            gradients,
            before,
            (b1, b2, eps),
            out_like=(tree.leaves, before),
        )
        unflatten = tree.treedef.unflatten
        trees = map(unflatten, (after.basis, after.mu, after.nu))
        return unflatten(directions), ScaleByLoftAdamState(after.count, after.turn, *trees)

    return optax.with_extra_args_support(optax.GradientTransformation(init, update))


def loft_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    *,
    second_moment: SecondMomentName = "calibrated",
    calibrate: bool = True,
    alternate: bool = True,
    scale_gradient: bool = True,
    reconstruct: bool = True,
    moves_first: _alternation.FactorName = "b",
    mask: Any | Callable[[optax.Params], Any] | None = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
    pairs: LoraPairs | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LoFT-AdamW: low-rank adaptation that follows full fine-tuning with AdamW.

    The drop-in for `optax.adamw` on the adapters of a model. The factor whose turn it is, say
    :math:`U`, moves by :math:`-\eta_k (\Delta U + \lambda U)`, with :math:`\Delta U` as in
    `scale_by_loft_adam`; the other rests, and does not decay either. Learning rates are those of
    full fine-tuning, not LoRA's larger ones: start from there.

    The arguments that it shares with `optax.adamw` have the same names, defaults and meaning; give
    those after ``eps`` by name, since that one has others in between.

    Args:
      learning_rate: a number or a schedule of the step.
      b1, b2, eps: as in `optax.adamw`.
      weight_decay: decoupled, times the learning rate; a number or a schedule. It decays the
        adapter's part of the weight, not the frozen base.
      mask: a tree of booleans, or a function from parameters to one, of what to decay.
      second_moment, calibrate, alternate, scale_gradient, reconstruct, moves_first, mu_dtype,
        nu_dtype, pairs: see `scale_by_loft_adam`.

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
    core = scale_by_loft_adam(
        b1,
        b2,
        eps,
        second_moment=second_moment,
        calibrate=calibrate,
        alternate=alternate,
        scale_gradient=scale_gradient,
        reconstruct=reconstruct,
        moves_first=moves_first,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
        pairs=pairs,
    )
    return descend(core, learning_rate, weight_decay, mask, alternate, moves_first, pairs)
