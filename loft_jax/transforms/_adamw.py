"""LoFT-AdamW: the paper's Algorithm 1, written in orthonormal bases."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loft_jax._basis import Basis
from loft_jax._mesh import in_auto_axes
from loft_jax._moments import AdamStep, adam_step
from loft_jax._pairs import LoraPairs, PairedTree, find_pairs
from loft_jax._side import (
    SECOND_MOMENTS,
    Moments,
    SecondMoment,
    advance_moments,
    factor_direction,
    projected_gradient,
)
from loft_jax.transforms import _alternation
from loft_jax.transforms._factors import (
    Group,
    check_bases,
    check_gradients,
    compute_dtype,
    group_pairs,
    leaves_like,
    leaves_outside,
    require_params,
)

SecondMomentName = Literal["calibrated", "factored"]


class ScaleByLoftAdamState(NamedTuple):
    """State of `scale_by_loft_adam`. All trees have the structure of the parameters.

    ``r`` below is the rank axis of a factor; where a field has another width than the factor, that
    axis is the one that differs. Dtypes are float32, or the parameter's if that is wider.

    Attributes:
      count: ``()`` int32, steps taken.
      turn: ``()`` int32, 0 when the factor named by ``moves_first`` moves at the next step, else 1.
      basis: for a factor its orthonormal basis at the last step, of the factor's shape;
        `optax.MaskedNode` for a leaf outside pairs.
      mu: first moment, of the parameter's shape, in ``mu_dtype``. A factor's is expressed in
        ``basis`` of its partner.
      nu: second moment. Calibrated: ``r (r + 1) / 2`` packed cross terms a row. Factored: the row
        sums and the laid-out Gram matrix, ``1 + ceil(r (r + 1) / 2 / rows)`` a row. Outside pairs:
        Adam's, of the parameter's shape.
    """

    count: jax.Array
    turn: jax.Array
    basis: Any
    mu: Any
    nu: Any


class _Options(NamedTuple):
    second: SecondMoment
    calibrate: bool
    alternate: bool
    moves_first: str


def scale_by_loft_adam(
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    *,
    second_moment: SecondMomentName = "calibrated",
    calibrate: bool = True,
    alternate: bool = True,
    moves_first: _alternation.Factor = "b",
    mu_dtype: jax.typing.DTypeLike | None = None,
    pairs: LoraPairs | None = None,
) -> optax.GradientTransformation:
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
      second_moment: "calibrated", the paper's, with ``r (r + 1) / 2`` cross terms a row, or
        "factored", Adafactor's rank-one estimate formed exactly in the basis: a state of LoRA's
        own size and no ``m x n`` work.
      calibrate: False leaves the moments in the coordinates of the raw factors (the paper's
        ablation of blocks 3 and 4).
      alternate: False moves both factors from the same point at every step (ablation of block 1).
      moves_first: the factor that moves first, "a" or "b". Choose the zero-initialised one: the
        other has no gradient until its partner has moved.
      mu_dtype: dtype of the first moment's state; None for the dtype of the computation.
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
      >>> updates["lora_b"].round(5)  # the full step, -0.1 * sign, projected on the ones of a
      Array([[-0.1,  0.1]], dtype=float32)
      >>> bool((updates["lora_a"] == 0).all())
      True
    """
    if second_moment not in SECOND_MOMENTS:
        names = ", ".join(map(repr, SECOND_MOMENTS))
        raise ValueError(f"second_moment must be one of {names}, got {second_moment!r}")
    _alternation.check_moves_first(moves_first)
    options = _Options(SECOND_MOMENTS[second_moment], calibrate, alternate, moves_first)

    def init(params: optax.Params) -> ScaleByLoftAdamState:
        tree = find_pairs(params, pairs)
        basis, mu, nu = _zero_state(tree, options.second, mu_dtype)
        return ScaleByLoftAdamState(
            count=jnp.zeros([], jnp.int32),
            turn=jnp.zeros([], jnp.int32),
            basis=tree.treedef.unflatten(basis),
            mu=tree.treedef.unflatten(mu),
            nu=tree.treedef.unflatten(nu),
        )

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        tree = find_pairs(require_params(params), pairs)
        gradients = leaves_like(tree, updates, "gradients")
        check_gradients(tree, gradients)
        before = ScaleByLoftAdamState(
            state.count, state.turn, *(leaves_like(tree, field, "states") for field in state[2:])
        )
        check_bases(tree, before.basis)
        directions, after = in_auto_axes(
            functools.partial(_step, tree, options),
            tree.leaves,
            gradients,
            before,
            (b1, b2, eps),
            out_like=(tree.leaves, before),
        )
        unflatten = tree.treedef.unflatten
        return unflatten(directions), ScaleByLoftAdamState(
            after.count, after.turn, *(unflatten(field) for field in after[2:])
        )

    return optax.GradientTransformation(init, update)


def loft_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    weight_decay: float | jax.Array = 1e-4,
    *,
    second_moment: SecondMomentName = "calibrated",
    calibrate: bool = True,
    alternate: bool = True,
    moves_first: _alternation.Factor = "b",
    mask: Any | Callable[[optax.Params], Any] | None = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
    pairs: LoraPairs | None = None,
) -> optax.GradientTransformation:
    r"""LoFT-AdamW: low-rank adaptation that follows full fine-tuning with AdamW.

    The drop-in for `optax.adamw` on the adapters of a model. The factor whose turn it is, say
    :math:`U`, moves by :math:`-\eta_k (\Delta U + \lambda U)`, with :math:`\Delta U` as in
    `scale_by_loft_adam`; the other rests, and does not decay either. Learning rates are those of
    full fine-tuning, not LoRA's larger ones: start from there.

    Args:
      learning_rate: a number or a schedule of the step.
      b1, b2, eps: as in `optax.adamw`.
      weight_decay: decoupled, times the learning rate. It decays the adapter's part of the weight,
        not the frozen base.
      mask: a tree of booleans, or a function from parameters to one, of what to decay.
      second_moment, calibrate, alternate, moves_first, mu_dtype, pairs: see `scale_by_loft_adam`.

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
      >>> state = tx.init(params)
      >>> for _ in range(200):
      ...   updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...   params = optax.apply_updates(params, updates)
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
        moves_first=moves_first,
        mu_dtype=mu_dtype,
        pairs=pairs,
    )
    decay = optax.add_decayed_weights(weight_decay, mask)
    rate = optax.scale_by_learning_rate(learning_rate)

    def init(params: optax.Params) -> tuple[Any, Any, Any]:
        return core.init(params), decay.init(params), rate.init(params)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        core_state, decay_state, rate_state = state
        updates, after = core.update(updates, core_state, params)
        updates, decay_state = decay.update(updates, decay_state, params)
        if alternate:
            updates = _rest(updates, params, core_state.turn, moves_first, pairs)
        updates, rate_state = rate.update(updates, rate_state, params)
        return updates, (after, decay_state, rate_state)

    return optax.GradientTransformation(init, update)


def _rest(
    updates: optax.Params,
    params: optax.Params | None,
    turn: jax.Array,
    moves_first: str,
    pairs: LoraPairs | None,
) -> optax.Params:
    """Zeroes the updates of the factors that rest at this turn (their weight decay)."""
    tree = find_pairs(require_params(params), pairs)
    leaves = leaves_like(tree, updates, "updates")
    moves_a = _alternation.a_moves(turn, moves_first)
    for pair in tree.pairs:
        leaves[pair.a] = jnp.where(moves_a, leaves[pair.a], 0)
        leaves[pair.b] = jnp.where(moves_a, 0, leaves[pair.b])
    return tree.treedef.unflatten(leaves)


def _zero_state(
    tree: PairedTree, second: SecondMoment, mu_dtype: jax.typing.DTypeLike | None
) -> tuple[list[Any], list[Any], list[Any]]:
    """Returns zero bases and moments, each laid out and sharded like its parameter."""
    basis: list[Any] = [optax.MaskedNode() for _ in tree.leaves]
    # Each array is made anew: one that served twice could not be donated to a compiled step.
    mu = [jnp.zeros_like(x, dtype=mu_dtype or compute_dtype(x)) for x in tree.leaves]
    nu = [jnp.zeros_like(x, dtype=compute_dtype(x)) for x in tree.leaves]
    for pair in tree.pairs:
        for k, layout, rows in ((pair.a, pair.layout_a, pair.m), (pair.b, pair.layout_b, pair.n)):
            basis[k], rank = jnp.zeros_like(nu[k]), layout.rank
            # Broadcasting from one rank column keeps the sharding of the other axes.
            column = jax.lax.slice_in_dim(nu[k], 0, 1, axis=rank)
            shape = (*column.shape[:rank], second.width(rows, pair.r), *column.shape[rank + 1 :])
            nu[k] = jnp.broadcast_to(column, shape)
    return basis, mu, nu


class _Side(NamedTuple):
    """A side of a group after this step's gradient: its moments in the basis of the partner."""

    moments: Moments
    basis: Basis


@jax.default_matmul_precision("highest")  # bfloat16 products would drown the cross terms
def _step(
    tree: PairedTree,
    options: _Options,
    params: list[jax.Array],
    gradients: list[jax.Array],
    state: ScaleByLoftAdamState,
    hyperparams: tuple[float | jax.Array, ...],
) -> tuple[list[jax.Array], ScaleByLoftAdamState]:
    """One step on flat lists of leaves: the directions and the new state."""
    b1, b2, eps = hyperparams
    count = optax.safe_increment(state.count)
    directions, basis, mu, nu = list(gradients), list(state.basis), list(state.mu), list(state.nu)

    for k in leaves_outside(tree):
        step = adam_step(count, b1, b2, eps, nu[k].dtype)
        directions[k], mu[k], nu[k] = _adam(gradients[k], mu[k], nu[k], b1, b2, step)

    groups, advanced, steps = group_pairs(tree), [], []
    for group in groups:
        bases = group.bases(params)
        both = []
        for factor, partner in group.sides:
            before = Moments(factor.tall(state.mu), factor.tall(state.nu))
            moments, stored = group.over_batch(
                functools.partial(_advance, options, group.scale, b1, b2)
            )(
                before,
                factor.tall(gradients),
                partner.tall(params),
                bases[partner],
                partner.tall(state.basis),
            )
            both.append(_Side(moments, bases[partner]))
            factor.put(stored.mu, mu, like=state.mu)
            factor.put(stored.nu, nu, like=state.nu)
            partner.put(bases[partner].q, basis, like=state.basis)
        advanced.append(both)
        steps.append(adam_step(count, b1, b2, eps, bases[group.a].q.dtype))

    moved = _move(groups, advanced, steps, options, state.turn)
    for group, of_group in zip(groups, moved, strict=True):
        for (factor, _), direction in zip(group.sides, of_group, strict=True):
            factor.put(direction, directions, like=gradients)
    of_factors = [gradients[k] for pair in tree.pairs for k in (pair.a, pair.b)]
    turn = _alternation.next_turn(state.turn, of_factors)
    return directions, ScaleByLoftAdamState(count, turn, basis, mu, nu)


def _adam(
    gradient: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    b1: float | jax.Array,
    b2: float | jax.Array,
    step: AdamStep,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adam's own direction and moments, for a leaf outside pairs."""
    g = gradient.astype(nu.dtype)
    first = b1 * mu.astype(nu.dtype) + (1 - b1) * g
    nu = b2 * nu + (1 - b2) * g * g
    direction = first / step.correction1 / (jnp.sqrt(nu / step.correction2) + step.eps)
    return direction.astype(gradient.dtype), first.astype(mu.dtype), nu


def _advance(
    options: _Options,
    scale: float,
    b1: float | jax.Array,
    b2: float | jax.Array,
    before: Moments,
    gradient: jax.Array,
    partner: jax.Array,
    basis: Basis,
    q_before: jax.Array,
) -> tuple[Moments, Moments]:
    """Adds a gradient to one side's moments: in the basis, and as they are stored."""
    second = options.second
    h = projected_gradient(gradient, basis, scale)
    if options.calibrate:
        moments = advance_moments(before, h, q_before.T @ basis.q, b1, b2, second)
        return moments, moments
    # Without calibration the moments stay in the coordinates of the raw factor V = Q L^T:
    # L = V^T Q takes them to the basis, inv(L) back.
    moments = advance_moments(before, h, partner.T @ basis.q, b1, b2, second)
    nu = second.transport(moments.nu, basis.l_inv)
    return moments, Moments(moments.mu @ basis.l_inv, nu)


def _move(
    groups: Sequence[Group],
    advanced: Sequence[Sequence[_Side]],
    steps: Sequence[AdamStep],
    options: _Options,
    turn: jax.Array,
) -> list[list[jax.Array]]:
    """Returns the directions of both factors of each group, zero for those that rest.

    One conditional for all of them: the ``m x n`` work of the resting factors does not run.
    """

    def direction(group: Group, step: AdamStep, side: _Side) -> jax.Array:
        direction_of = functools.partial(
            factor_direction,
            scale=group.scale,
            step=step,
            second=options.second,
            copies=math.prod(group.batch),
        )
        return group.over_batch(direction_of)(*side)

    def move(which: str) -> list[list[jax.Array]]:
        return [
            [
                direction(group, step, side) if name in which else jnp.zeros_like(side.moments.mu)
                for name, side in zip("ab", both, strict=True)
            ]
            for group, both, step in zip(groups, advanced, steps, strict=True)
        ]

    if not options.alternate:
        return move("ab")
    moves_a = _alternation.a_moves(turn, options.moves_first)
    return jax.lax.cond(moves_a, lambda: move("a"), lambda: move("b"))
