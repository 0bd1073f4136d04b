"""LoRA-RITE: an r x r preconditioner of each factor, in an orthonormal basis of its partner."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from loft_jax.algorithm.adam import as_scalar, one_minus_power
from loft_jax.algorithm.basis import (
    Basis,
    calibration_matrix,
    orthonormal_basis,
    scale_gradient,
    to_factor,
)
from loft_jax.algorithm.cross_terms import packed, packed_size, unpacking
from loft_jax.algorithm.jacobi import symmetric_eigen
from loft_jax.execution.arguments import read_state
from loft_jax.execution.groups import group_pairs
from loft_jax.execution.transformation import Core, as_transformation, descend
from loft_jax.execution.update import zero_state
from loft_jax.pairs.find import PairedTree


class ScaleByLoraRiteState(NamedTuple):
    """State of `scale_by_lora_rite`. The trees have the structure of the parameters.

    Attributes:
      count: ``()`` int32, steps taken.
      basis: the orthonormal basis of each factor at the last step; `optax.MaskedNode` for a
        non-LoRA parameter.
      mu: first moment of the preconditioned gradient, in ``basis`` of the partner.
      nu: the packed ``r x r`` second moment and the escaped mass, laid out over the rows of the
        factor: ``ceil((1 + r (r + 1) / 2) / rows)`` numbers a row.
    """

    count: jax.Array
    basis: Any
    mu: Any
    nu: Any


def scale_by_lora_rite(
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-6,
    eps_root: float | jax.Array = 0.0,
    *,
    escaped_mass: bool = True,
    pairs: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The core of LoRA-RITE, without learning rate, for chaining.

    For :math:`W = W_0 + s U V^\top`, with :math:`sV = Q R` and :math:`P = Q^\top Q_-`, the step of
    :math:`U` (:math:`m` rows) is

    .. math::
      \bar g &= \nabla_U f \, R^{-1} \\
      \rho &\leftarrow \beta_2 (\rho + \max_i |\lambda_i(\bar V) - \lambda_i(P \bar V P^\top)|) \\
      \bar V &\leftarrow \beta_2 P \bar V P^\top + (1 - \beta_2) \bar g^\top \bar g / m \\
      \bar S &= \bar g \, (\sqrt{\hat V + \hat\rho I} + \epsilon I)^{-1} \\
      \bar M &\leftarrow \beta_1 \bar M P^\top + (1 - \beta_1) \bar S \\
      \Delta U &= \hat M R^{-\top}

    with :math:`\lambda_i` the eigenvalues in order and hats for Adam's bias corrections; that of
    :math:`V` the same with the roles exchanged. Both factors move at every step. The path of ``W``
    does not depend on how it is factored, its scale included. Updates of non-LoRA parameters are
    unchanged.

    Args:
      b1, b2: decay rates.
      eps: added outside of the square root, where Optax's default for Adam is 1e-8.
      eps_root: added inside of it.
      escaped_mass: whether to use :math:`\rho`.
      pairs: the LoRA pairs, as in `scale_by_loft_adam`.

    Returns:
      A transformation whose ``update`` needs ``params``.

    Raises:
      ValueError, TypeError: as `scale_by_loft_adam`.

    Source: Yen, Si, Meng, Yu, Duvvuri, Dhillon, Hsieh and Kumar, "LoRA Done RITE: Robust Invariant
      Transformation Equilibration for LoRA Optimization", ICLR 2025. The paper states the second
      moment as a sum. The averages, their bias corrections and the mean over rows are those of the
      released code, which is without escaped mass by default, clips the norm of all
      :math:`\bar g` at 1, skips those with a root mean square above 1, and does not use the scale.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"lora_a": jnp.array([[3.0], [4.0]]), "lora_b": jnp.zeros((1, 2))}
      >>> grads = {"lora_a": jnp.zeros((2, 1)), "lora_b": jnp.array([[35.0, 5.0]])}
      >>> tx = scale_by_lora_rite()
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> expected = jnp.array([[1.4, 0.2]]) / 5  # the gradient over its root mean square
      >>> bool(jnp.allclose(updates["lora_b"], expected, atol=1e-5))
      True
    """
    hyperparams = _Hyperparams(b1, b2, eps, eps_root)
    return as_transformation(_lora_rite_core(hyperparams, escaped_mass), pairs)


def lora_rite(
    learning_rate: optax.ScalarOrSchedule,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-6,
    eps_root: float | jax.Array = 0.0,
    *,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    escaped_mass: bool = True,
    pairs: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """LoRA-RITE: transformation-invariant matrix preconditioning of the factors.

    Non-LoRA parameters get `optax.adam` with the same learning rate, ``b1``, ``b2``, ``eps`` and
    ``eps_root``.

    Args:
      learning_rate: a number or a schedule.
      weight_decay: of the factors; decoupled, and multiplied by the learning rate.
      mask: a tree of booleans, or a function from parameters to one, of the factors to decay.
      b1, b2, eps, eps_root, escaped_mass, pairs: see `scale_by_lora_rite`.

    Returns:
      A transformation whose ``update`` needs ``params``. State: basis and first moment, ``2 r``
      numbers per row, and about one number more.

    Raises:
      ValueError, TypeError: as `scale_by_loft_adam`.

    Source: see `scale_by_lora_rite`.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"lora_a": jnp.array([[3.0], [4.0]]), "lora_b": jnp.zeros((1, 2))}
      >>> grads = {"lora_a": jnp.zeros((2, 1)), "lora_b": jnp.array([[25.0, 25.0]])}
      >>> tx = lora_rite(0.1)
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> updates["lora_b"].round(4)
      Array([[-0.02, -0.02]], dtype=float32)
    """
    core = _lora_rite_core(_Hyperparams(b1, b2, eps, eps_root), escaped_mass)
    return descend(
        core,
        learning_rate,
        pairs,
        weight_decay=weight_decay,
        mask=mask,
        others=optax.adam(learning_rate, b1, b2, eps, eps_root),
    )


class _Hyperparams(NamedTuple):
    """Numbers that may change from step to step."""

    b1: float | jax.Array
    b2: float | jax.Array
    eps: float | jax.Array
    eps_root: float | jax.Array


def _lora_rite_core(
    hyperparams: _Hyperparams, escaped_mass: bool
) -> Core[ScaleByLoraRiteState, _Hyperparams]:
    widths = (lambda m, r: r, lambda m, r: -(-(1 + packed_size(r)) // m))

    def init(tree: PairedTree) -> ScaleByLoraRiteState:
        fields = zero_state(tree, widths, (None, None))
        for k in tree.others:  # the optimizer of these keeps their moments
            fields[1][k] = fields[2][k] = optax.MaskedNode()
        return ScaleByLoraRiteState(jnp.zeros([], jnp.int32), *map(tree.treedef.unflatten, fields))

    @jax.default_matmul_precision("highest")
    def step(
        hyperparams: _Hyperparams,
        tree: PairedTree,
        gradients: list[Any],
        state: ScaleByLoraRiteState,
    ) -> tuple[list[Any], ScaleByLoraRiteState]:
        fields = read_state(tree, (state.basis, state.mu, state.nu), widths, others=False)
        count = jnp.asarray(optax.safe_increment(state.count))
        directions, new = list(gradients), [list(field) for field in fields]
        for group in group_pairs(tree):
            basis_of = functools.partial(orthonormal_basis, scale=group.kind.scale)
            of_factor = functools.partial(_factor, hyperparams, escaped_mass, count)
            over_batch = group.kind.over_batch
            for own, partner in ("ab", "ba"):
                basis = over_batch(basis_of)(group.matrices(partner, tree.leaves))
                before = [group.matrices(own, field) for field in fields[1:]]
                gradient = group.matrices(own, gradients)
                seen = group.matrices(partner, fields[0])
                direction, *after = over_batch(of_factor)(gradient, basis, seen, *before)
                group.put_matrices(own, direction, directions, gradients)
                group.put_matrices(partner, basis.q, new[0], fields[0])
                for x, target, old in zip(after, new[1:], fields[1:], strict=True):
                    group.put_matrices(own, x, target, old)
        return directions, ScaleByLoraRiteState(count, *map(tree.treedef.unflatten, new))

    return Core(ScaleByLoraRiteState, init, step, hyperparams, sharded=False)


def _factor(
    hyperparams: _Hyperparams,
    escaped_mass: bool,
    count: jax.Array,
    gradient: Float[Array, "m r"],
    basis: Basis,
    seen: Float[Array, "n r"],
    mu: Float[Array, "m r"],
    nu: Float[Array, "m width"],
) -> tuple[Float[Array, "m r"], Float[Array, "m r"], Float[Array, "m width"]]:
    """Returns the direction of a factor, and its moments."""
    b1, b2, eps, eps_root = (as_scalar(x, gradient.dtype) for x in hyperparams)
    k = jnp.asarray(count, gradient.dtype)
    m, r = gradient.shape
    h = scale_gradient(gradient, basis)
    calibration = calibration_matrix(seen, basis)
    second, escaped = _unpack(nu, r)
    carried = calibration.T @ second @ calibration
    if escaped_mass:
        eigenvalues = lambda matrix: jnp.sort(symmetric_eigen(matrix)[0])
        lost = jnp.max(jnp.abs(eigenvalues(second) - eigenvalues(carried)))
        escaped = b2 * (escaped + lost)
    second = b2 * carried + (1 - b2) * (h.T @ h) / m
    correction = one_minus_power(b2, k)
    values, vectors = symmetric_eigen(second / correction)
    values = jnp.maximum(values, 0) + escaped / correction + eps_root
    root = jnp.sqrt(values) + eps
    inverse = (vectors / jnp.where(root > 0, root, 1)) @ vectors.T
    mu = b1 * mu @ calibration + (1 - b1) * h @ inverse
    direction = to_factor(mu / one_minus_power(b1, k), basis)
    # The step is never 0: the choice shows the compiler that the new state is sharded as the old.
    return direction, mu, jnp.where(k > 0, _pack(second, escaped, nu), nu)


def _pack(
    second: Float[Array, "r r"], escaped: Float[Array, ""], like: Float[Array, "m width"]
) -> Float[Array, "m width"]:
    entries = jnp.append(packed(second), escaped)
    return jnp.pad(entries, (0, like.size - len(entries))).reshape(like.shape)


def _unpack(nu: Float[Array, "m width"], r: int) -> tuple[Float[Array, "r r"], Float[Array, ""]]:
    """Inverse of `_pack`."""
    entries = nu.ravel()[: packed_size(r) + 1]
    return entries[:-1][unpacking(r)], entries[-1]
