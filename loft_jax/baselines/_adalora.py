"""AdaLoRA: a rank budget that is reallocated between adapters, with arrays of fixed shapes.

An adapter is ``scale * a @ diag(e) @ b``, an unnormalised singular value decomposition. Its rank is
reduced by setting entries of ``e`` to zero: those of the triplets ``(a[:, i], e[i], b[i])`` with
the lowest importance among all adapters.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from loft_jax.baselines._budget import budget_schedule, keep_highest
from loft_jax.baselines._triplets import DEFAULT_VALUES, Triplets, find_triplets, members
from loft_jax.execution.arguments import leaves_like, read_arguments
from loft_jax.execution.explicit_mesh import in_auto_axes
from loft_jax.execution.groups import compute_dtype
from loft_jax.pairs.find import PairedTree, find_pairs


class AdaloraState(NamedTuple):
    """State of `adalora`.

    Attributes:
      count: number of steps taken, int32.
      sensitivity: the smoothed ``|w * dL/dw|`` of each entry (eq. (9)), a tree like the parameters.
        Arrays have the shapes of the factors and of ``lora_e``, in at least float32; other leaves
        are `optax.MaskedNode`.
      uncertainty: the smoothed deviation of ``|w * dL/dw|`` from ``sensitivity`` (eq. (10)), a tree
        of the same structure.
      inner: state of the inner transformation.
    """

    count: jax.Array
    sensitivity: optax.Params
    uncertainty: optax.Params
    inner: optax.OptState


def adalora(
    inner: optax.GradientTransformation,
    *,
    target_rank: int | float,
    total_step: int,
    t_init: int = 0,
    t_final: int = 0,
    delta_t: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
    pairs: Any = None,
    values: tuple[tuple[str, str], ...] = DEFAULT_VALUES,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaLoRA around an optimizer: allocates a decreasing rank budget among all adapters.

    For weights :math:`W = W_0 + s\, A\, \mathrm{diag}(e)\, B` in the layout of Flax (:math:`Q^\top`
    and :math:`P^\top` of the paper). At every step each entry ``w`` of the three, with gradient
    ``g``, has

    .. math::
      I &= |w g|, \quad
      \bar I \leftarrow \beta_1 \bar I + (1 - \beta_1) I, \quad
      \bar U \leftarrow \beta_2 \bar U + (1 - \beta_2) |I - \bar I|, \quad
      s(w) = \bar I \bar U \\
      S_i &= s(e_i) + \mathrm{mean}_j\, s(A_{ji}) + \mathrm{mean}_j\, s(B_{ij})

    Then ``inner`` updates all of them. At every ``delta_t``-th step after ``t_init``, only the
    triplets with the highest scores are kept, as many as `budget_schedule` allows. The values ``e``
    of the others are set to exactly zero. Until the next such step these values continue to train
    and may become nonzero again. In the last ``t_final`` steps the scores are frozen, and the same
    triplets stay zero.

    Do not change the updates afterwards: put learning rate, clipping and weight decay into
    ``inner``. All adapters that share a budget must be in one call. Initialise ``lora_a`` and
    ``lora_b`` with normal values (a deviation of 0.02 in the released code) and ``lora_e`` with
    zero, and add `orthogonality_penalty` to the loss.

    Args:
      inner: the optimizer of all leaves, for example ``optax.adamw(...)``.
      target_rank: the average rank per adapter at the end (each layer of a stack is one adapter).
        The initial rank is that of the arrays, about 1.5 times the target rank in the paper.
      total_step: number of training steps.
      t_init: number of warm-up steps, with the initial budget and no allocation.
      t_final: number of steps at the end with the final allocation; with 0 the target may not be
        reached.
      delta_t: number of steps between two allocations.
      beta1: decay rate of the sensitivity.
      beta2: decay rate of the uncertainty.
      pairs: the LoRA pairs, as in `scale_by_loft_adam`.
      values: ``(regex of the path of a, template of the path of its e)``; the first match is used.
        ``e`` has shape ``(*batch, r)``.

    Returns:
      A transformation whose ``update`` needs ``params``, with the state `AdaloraState`. The updates
      are those of ``inner``, except that updates of ``lora_e`` have at least the dtype of
      ``lora_e``, so that pruned values become exactly zero.

    Raises:
      ValueError: numbers out of range; a pair without its ``e``, or an ``e`` of another shape than
        ``(*batch, r)``; a target above the initial ranks; pairs, gradients or a state that do not
        match the parameters; missing ``params``.
      TypeError: a parameter that is not a real floating-point array.

    Source: Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR
      2023, Algorithm 1 and eqs. (5) to (12). As in the paper, ``I`` uses the parameter ``w`` before
      the step (the released code and PEFT use the one after it), the number of triplets kept is
      exactly the budget (there, ties at the threshold are pruned), and the last phase begins with
      step ``total_step - t_final`` (in the released code, one later). As in the released code,
      steps count from 0, steps up to ``t_init`` do not allocate, and scores are frozen in the last
      phase. The model applies the adapter's scale; the released code divides alpha by the initial
      rank.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> params = {"lora_a": jnp.eye(4, 2), "lora_e": jnp.ones(2), "lora_b": jnp.eye(2, 3)}
      >>> loss = lambda p: jnp.sum((p["lora_a"] * p["lora_e"] @ p["lora_b"])[0, 0] - 3.0) ** 2
      >>> tx = adalora(optax.adam(0.1), target_rank=1, total_step=4)
      >>> state = tx.init(params)
      >>> for _ in range(4):
      ...   updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...   params = optax.apply_updates(params, updates)
      >>> (params["lora_e"] != 0).tolist()  # the one that the loss depends on
      [True, False]
    """
    _check_numbers(target_rank, total_step, t_init, t_final, delta_t, beta1, beta2)
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> AdaloraState:
        tree, adapters = find_triplets(params, pairs, values)
        _ranks(adapters, target_rank)
        return AdaloraState(
            jnp.zeros([], jnp.int32),
            _zeros(tree, adapters),
            _zeros(tree, adapters),
            inner.init(params),
        )

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        if params is None:
            raise ValueError("AdaLoRA weighs the factors: call update(grads, state, params)")
        tree, adapters = find_triplets(params, pairs, values)
        _, gradients = read_arguments(params, updates, pairs)
        directions, inner_state = inner.update(updates, state.inner, params, **extra)
        moves = leaves_like(tree, directions, "updates")
        old = (
            leaves_like(tree, state.sensitivity, "states"),
            leaves_like(tree, state.uncertainty, "states"),
        )
        _check_state(tree, adapters, old)
        initial, target = _ranks(adapters, target_rank)
        budget = budget_schedule(initial, target, total_step, t_init, t_final)

        def allocate(count, leaves, gradients, moves, sensitivity, uncertainty):
            last = count >= total_step - t_final
            scored = lambda old, new: jnp.where(last, old, new)
            for k in members(adapters):
                new = _smooth(leaves[k], gradients[k], sensitivity[k], uncertainty[k], beta1, beta2)
                sensitivity[k] = scored(sensitivity[k], new[0])
                uncertainty[k] = scored(uncertainty[k], new[1])
            keep = keep_highest(_scores(adapters, sensitivity, uncertainty), budget(count))
            due = last | (count % delta_t == 0)  # up to t_init the budget covers all triplets
            for adapter, kept in zip(adapters, keep, strict=True):
                e, move = leaves[adapter.e], moves[adapter.e]
                # e + (-e) is exactly zero in a dtype that represents -e.
                dtype = jnp.promote_types(e.dtype, move.dtype)
                moves[adapter.e] = jnp.where(due & ~kept, -e.astype(dtype), move.astype(dtype))
            return moves, sensitivity, uncertainty

        moves, sensitivity, uncertainty = in_auto_axes(
            allocate,
            state.count,
            tree.leaves,
            gradients,
            moves,
            *old,
            out_like=(tree.leaves, *old),
        )
        unflatten = tree.treedef.unflatten
        return unflatten(moves), AdaloraState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            sensitivity=unflatten(sensitivity),
            uncertainty=unflatten(uncertainty),
            inner=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


@jax.default_matmul_precision("highest")
def orthogonality_penalty(params: optax.Params, pairs: Any = None) -> jax.Array:
    r"""Returns AdaLoRA's regulariser. Add it to the loss with a coefficient.

    .. math:: \sum_k \|A_k^\top A_k - I\|_F^2 + \|B_k B_k^\top - I\|_F^2

    Args:
      params: a pytree with the adapters' ``lora_a`` and ``lora_b``; other leaves are ignored.
      pairs: the LoRA pairs, as in `scale_by_loft_adam`.

    Returns:
      A scalar, in at least float32.

    Raises:
      ValueError, TypeError: as `find_pairs`.

    Source: Zhang et al., ICLR 2023, eq. (4), summed over the weights as in its objective. The
      released code and PEFT use the mean over all factors of the norms, not squared, so their
      coefficients (0.1 to 0.5) do not apply here.

    Example:
      >>> import jax.numpy as jnp
      >>> float(orthogonality_penalty({"lora_a": jnp.eye(4, 2), "lora_b": 2 * jnp.eye(2, 3)}))
      18.0
    """
    tree = find_pairs(params, pairs)

    def excess(matrix: Float[Array, "*batch n r"]) -> jax.Array:
        matrix = matrix.astype(compute_dtype(matrix))
        gram = jnp.swapaxes(matrix, -1, -2) @ matrix
        return jnp.sum((gram - jnp.eye(gram.shape[-1], dtype=gram.dtype)) ** 2)

    factors = [(p.layout_a, p.a) for p in tree.pairs] + [(p.layout_b, p.b) for p in tree.pairs]
    return sum(
        (excess(layout.matricize(tree.leaves[k])) for layout, k in factors), jnp.float32(0.0)
    )


def _zeros(tree: PairedTree, adapters: Sequence[Triplets]) -> optax.Params:
    leaves: list[Any] = [optax.MaskedNode() for _ in tree.leaves]
    for k in members(adapters):
        leaf = tree.leaves[k]
        leaves[k] = jnp.zeros_like(leaf, dtype=compute_dtype(leaf))  # with the leaf's sharding
    return tree.treedef.unflatten(leaves)


def _smooth(
    w: jax.Array, g: jax.Array, sensitivity: jax.Array, uncertainty: jax.Array, b1: float, b2: float
) -> tuple[jax.Array, jax.Array]:
    """Eqs. (8) to (10) for the entries of one leaf."""
    importance = jnp.abs(w.astype(sensitivity.dtype) * g.astype(sensitivity.dtype))
    sensitivity = b1 * sensitivity + (1 - b1) * importance
    return sensitivity, b2 * uncertainty + (1 - b2) * jnp.abs(importance - sensitivity)


def _scores(
    adapters: Sequence[Triplets], sensitivity: Sequence[Any], uncertainty: Sequence[Any]
) -> list[jax.Array]:
    """Eqs. (7) and (11): the importance of each triplet, ``(*batch, r)`` for each adapter."""
    scores = []
    for adapter in adapters:
        pairs = zip(adapter.per_triplet(sensitivity), adapter.per_triplet(uncertainty), strict=True)
        of_a, of_e, of_b = (x * y for x, y in pairs)
        scores.append(of_e + of_a.mean(-2) + of_b.mean(-2))
    return scores


def _ranks(adapters: Sequence[Triplets], target_rank: int | float) -> tuple[int, int]:
    """Returns the initial and the final total rank."""
    matrices = [math.prod(adapter.pair.batch) for adapter in adapters]
    initial = sum(n * adapter.pair.r for n, adapter in zip(matrices, adapters, strict=True))
    target = round(target_rank * sum(matrices))
    if target > initial:
        raise ValueError(
            f"adalora: target_rank {target_rank} is above the initial rank, {initial} in all of "
            f"{sum(matrices)} adapters: begin with larger factors"
        )
    return initial, target


def _check_state(
    tree: PairedTree, adapters: Sequence[Triplets], moments: Sequence[Sequence[Any]]
) -> None:
    for k in members(adapters):
        found = [getattr(moment[k], "shape", None) for moment in moments]
        if found != [jnp.shape(tree.leaves[k])] * 2:
            raise ValueError(
                f"The state of {tree.paths[k]} is not for shape {jnp.shape(tree.leaves[k])}: its "
                f"sensitivity and uncertainty have shapes {found}. After a change of rank or of "
                "the pairs, make it anew with init"
            )


def _check_numbers(
    target_rank: int | float,
    total_step: int,
    t_init: int,
    t_final: int,
    delta_t: int,
    beta1: float,
    beta2: float,
) -> None:
    if not target_rank > 0:
        raise ValueError(f"adalora: target_rank must be above 0, got {target_rank}")
    if min(t_init, t_final) < 0 or delta_t < 1 or total_step <= t_init + t_final:
        raise ValueError(
            "adalora: it takes total_step > t_init + t_final, both at least 0, and delta_t at "
            f"least 1, got {total_step=}, {t_init=}, {t_final=}, {delta_t=}"
        )
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"adalora: beta1 and beta2 lie in [0, 1), got {beta1} and {beta2}")
