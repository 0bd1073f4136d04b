"""LoFT with momentum: the method of the paper's lemmas, and what LoFT-Muon builds on."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loft_jax._frame import Frame, to_factor
from loft_jax._mesh import in_auto_axes
from loft_jax._moments import as_scalar
from loft_jax._pairs import LoraPairs, find_pairs
from loft_jax._rows import Rows
from loft_jax._side import Calibration, advance_momentum
from loft_jax.transforms import _alternation
from loft_jax.transforms._descent import descend
from loft_jax.transforms._factors import (
    check_state,
    compute_dtype,
    leaves_like,
    read_arguments,
)
from loft_jax.transforms._step import Blocks, Memory, Method, loft_step, zero_memory


class ScaleByLoftMomentumState(NamedTuple):
    """State of `scale_by_loft_momentum` and `scale_by_loft_muon`.

    The trees have the structure of the parameters; dtypes are float32, or the parameter's if that
    is wider. Without momentum there is nothing to keep, and both trees are None.

    Attributes:
      turn: ``()`` int32, 0 when the factor named by ``moves_first`` moves at the next step, else 1.
      basis: for a factor its orthonormal basis at the last step, of the factor's shape;
        `optax.MaskedNode` for a leaf outside pairs.
      mu: the moment, of the parameter's shape, in the dtype asked for. A factor's is expressed in
        ``basis`` of its partner.
    """

    turn: jax.Array
    basis: Any
    mu: Any


def scale_by_loft_momentum(
    momentum: float | jax.Array | None = 0.9,
    nesterov: bool = False,
    *,
    alternate: bool = True,
    moves_first: _alternation.FactorName = "b",
    accumulator_dtype: jax.typing.DTypeLike | None = None,
    pairs: LoraPairs | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The core of LoFT with momentum, without learning rate, for chaining.

    For the pair :math:`W = W_0 + s U V^\top`, with :math:`sV = Q L^\top` and
    :math:`T = Q_-^\top Q`, the side of :math:`U` is

    .. math::
      h &= \nabla_U f \, L^{-\top} & \text{(block 2)} \\
      M &\leftarrow \mu M T + h & \text{(block 3)} \\
      \Delta U &= M L^{-1}

    so that :math:`s \Delta U V^\top` is the momentum of full fine-tuning, as far as the subspaces
    hold it. Leaves outside pairs get plain momentum, as from `optax.trace`.

    Args:
      momentum: decay of the moment; None keeps no moment at all.
      nesterov: look ahead, with ``h + momentum * M`` in the place of ``M``; nothing without
        momentum.
      alternate, moves_first, pairs: as in `scale_by_loft_adam`.
      accumulator_dtype: dtype of the moment's state; None for the dtype of the computation.

    Returns:
      A transformation whose ``update`` needs ``params``. Its updates have the gradients' dtypes.

    Raises:
      ValueError, TypeError: as `scale_by_loft_adam`.

    Source: blocks 1 to 3 of Tastan et al., ICLR 2026, and the LoFT-GD of its appendix B.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"lora_a": jnp.full((3, 1), 10.0), "lora_b": jnp.zeros((1, 2))}
      >>> full = jnp.ones((3, 2))  # gradient of the weight, in the span of lora_a
      >>> grads = {"lora_a": jnp.zeros((3, 1)), "lora_b": params["lora_a"].T @ full}
      >>> tx = scale_by_loft_momentum()
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> bool(jnp.allclose(params["lora_a"] @ updates["lora_b"], full, atol=1e-5))
      True
    """

    def direction(_: tuple[()], source: jax.Array, frame: Frame, rows: Rows) -> jax.Array:
        return to_factor(source, frame)

    order = Blocks(alternate=alternate, moves_first=moves_first)
    return momentum_transformation(
        direction, (), momentum, nesterov, order, accumulator_dtype, pairs
    )


def momentum_transformation(
    direction: Callable[[Any, jax.Array, Frame, Rows], jax.Array],
    options: Any,
    momentum: float | jax.Array | None,
    nesterov: bool,
    blocks: Blocks,
    dtype: jax.typing.DTypeLike | None,
    pairs: LoraPairs | None,
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation that moves factors along a function of the calibrated moment.

    Args:
      direction: ``(options, M, frame, rows) ->`` the factor's update; ``rows`` says how those of
        ``M`` are spread.
      options: a pytree of numbers, its hyper-parameters.
      momentum, nesterov, dtype, pairs: see `scale_by_loft_momentum`.
      blocks: whose turn it is.
    """
    _alternation.check_factor_name(blocks.moves_first)
    widths = (lambda m, r: r,)

    def init(params: optax.Params) -> ScaleByLoftMomentumState:
        tree = find_pairs(params, pairs)
        turn = jnp.zeros([], jnp.int32)
        if momentum is None:
            return ScaleByLoftMomentumState(turn, None, None)
        memory = zero_memory(tree, widths, (dtype,))
        trees = map(tree.treedef.unflatten, (memory.basis, *memory.moments))
        return ScaleByLoftMomentumState(turn, *trees)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        tree, gradients = read_arguments(params, updates, pairs, parts=True)
        if (state.mu is None) != (momentum is None):
            raise ValueError(
                f"The state has {'no' if state.mu is None else 'a'} moment, but momentum is "
                f"{momentum}: make it anew with init"
            )
        before = Memory([], ())
        if momentum is not None:
            basis, mu = (leaves_like(tree, field, "states") for field in (state.basis, state.mu))
            check_state(tree, basis, (mu,), widths)
            before = Memory(basis, (mu,))

        def step(params, gradients, turn, before, momentum, options):
            method = Method(
                lambda moments, h, calibration, rows: _advance(momentum, moments, h, calibration),
                lambda moments, h, frame, copies, rows: direction(
                    options, _source(momentum, nesterov, moments, h), frame, rows
                ),
                functools.partial(_outside, momentum, nesterov),
            )
            return loft_step(tree, method, blocks, params, gradients, turn, before)

        directions, turn, after = in_auto_axes(
            step,
            tree.leaves,
            gradients,
            state.turn,
            before,
            momentum,
            options,
            out_like=(tree.leaves, state.turn, before),
        )
        unflatten = tree.treedef.unflatten
        trees = (
            map(unflatten, (after.basis, *after.moments)) if momentum is not None else (None,) * 2
        )
        return unflatten(directions), ScaleByLoftMomentumState(turn, *trees)

    return optax.with_extra_args_support(optax.GradientTransformation(init, update))


def _advance(
    momentum: float | jax.Array | None,
    before: tuple[jax.Array, ...],
    h: jax.Array,
    calibration: Calibration | None,
) -> tuple[jax.Array, ...]:
    """One side's moment."""
    if momentum is None:
        return ()
    transport = None if calibration is None else calibration.matrix
    return (advance_momentum(before[0], h, transport, as_scalar(momentum, h.dtype)),)


def _source(
    momentum: float | jax.Array | None,
    nesterov: bool,
    moments: tuple[jax.Array, ...],
    h: jax.Array,
) -> jax.Array:
    """What a side moves along."""
    if momentum is None:
        return h
    return h + as_scalar(momentum, h.dtype) * moments[0] if nesterov else moments[0]


def _outside(
    momentum: float | jax.Array | None, nesterov: bool, gradient: jax.Array, *mu: jax.Array
) -> tuple[jax.Array, ...]:
    """Plain momentum for a leaf outside pairs."""
    if momentum is None:
        return (gradient,)
    wide = gradient.astype(compute_dtype(gradient))
    new = _advance(momentum, (mu[0].astype(wide.dtype),), wide, None)
    source = _source(momentum, nesterov, new, wide)
    return source.astype(gradient.dtype), new[0].astype(mu[0].dtype)


def loft_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float | jax.Array | None = None,
    nesterov: bool = False,
    *,
    alternate: bool = True,
    moves_first: _alternation.FactorName = "b",
    accumulator_dtype: jax.typing.DTypeLike | None = None,
    pairs: LoraPairs | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LoFT with (momentum) gradient descent: the drop-in for `optax.sgd` on adapters.

    The weight moves by :math:`-\eta \, G P_V` or :math:`-\eta \, P_U G` in turn, or by the
    calibrated momentum of these. The learning rate is that of full fine-tuning: no ``|V|²`` is in
    the step, which makes the problem in each factor as smooth as it is in the weight.

    Args:
      learning_rate: a number or a schedule of the step.
      momentum, nesterov, alternate, moves_first, accumulator_dtype, pairs: see
        `scale_by_loft_momentum`.

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
    core = scale_by_loft_momentum(
        momentum,
        nesterov,
        alternate=alternate,
        moves_first=moves_first,
        accumulator_dtype=accumulator_dtype,
        pairs=pairs,
    )
    return descend(core, learning_rate, 0.0, None, alternate, moves_first, pairs)
