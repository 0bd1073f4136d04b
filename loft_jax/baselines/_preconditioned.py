"""Riemannian preconditioning ("scaled" optimizers) and LoRA-FA.

Both multiply the gradient of a factor by the inverse Gram matrix of its partner, then apply AdamW
or SGD.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from loft_jax.baselines._checked import checked
from loft_jax.baselines._matrices import Spectrum, inverse_gram, over_factors
from loft_jax.execution.alternation import FactorName, check_factor_name
from loft_jax.execution.arguments import read_arguments
from loft_jax.execution.explicit_mesh import in_auto_axes
from loft_jax.pairs.find import find_pairs


def precondition_by_partner(
    damping: float | jax.Array = 1e-6, *, pairs: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies the gradient of each factor by :math:`(V^\top V + \delta I)^{-1}` of its partner.

    As in the paper, the adapter's scale is not used, so the step in ``W`` is proportional to its
    square. Updates of non-LoRA parameters are unchanged.

    Args:
      damping: :math:`\delta`, absolute. It has a large effect: the authors tuned it from 0 to 1e8,
        and far above :math:`V^\top V` the result is the plain gradient, up to a factor.
      pairs: the LoRA pairs, as in `scale_by_loft_adam`.

    Returns:
      A transformation without state whose ``update`` needs ``params``.

    Raises:
      ValueError, TypeError: as `scale_by_loft_adam`.

    Source: Zhang and Pilanci, "Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models",
      ICML 2024.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"lora_a": jnp.array([[3.0], [4.0]]), "lora_b": jnp.zeros((1, 2))}
      >>> grads = {"lora_a": jnp.zeros((2, 1)), "lora_b": jnp.array([[25.0, 50.0]])}
      >>> updates, _ = precondition_by_partner().update(grads, optax.EmptyState(), params)
      >>> updates["lora_b"].round(4)
      Array([[1., 2.]], dtype=float32)
    """
    return _preconditioner(damping, "ab", False, pairs)


def scaled_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    eps_root: float | jax.Array = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: float | jax.Array = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    nesterov: bool = False,
    damping: float | jax.Array = 1e-6,
    pairs: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Riemannian preconditioned LoRA with AdamW: `precondition_by_partner`, then `optax.adamw`.

    Args:
      learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov: as in
        `optax.adamw`. The default weight decay is 0, where Optax's is 1e-4.
      damping, pairs: see `precondition_by_partner`.

    Returns:
      A transformation whose ``update`` needs ``params``. State: AdamW's, ``2 r`` numbers per row.

    Raises:
      ValueError, TypeError: as `scale_by_loft_adam`.

    Source: Zhang and Pilanci, ICML 2024. Both preconditioners use the factors before the step, as
      in the paper and in PEFT; in the released AdamW the second factor uses the updated first
      factor. Bias correction and decoupled weight decay are as in `optax.adamw`; the released code
      omits the bias correction by default.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = {"lora_a": jnp.ones((3, 1)), "lora_b": jnp.zeros((1, 2))}
      >>> tx = scaled_adamw(1e-3)
      >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
      >>> round(float(updates["lora_b"][0, 0]), 4)
      -0.001
    """
    adamw = optax.adamw(
        learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov=nesterov
    )
    return checked(optax.chain(precondition_by_partner(damping, pairs=pairs), adamw), pairs)


def scaled_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    damping: float | jax.Array = 1e-6,
    pairs: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Riemannian preconditioned LoRA with gradient descent ("scaled GD").

    Args:
      learning_rate: a number or a schedule of the step.
      damping, pairs: see `precondition_by_partner`.

    Returns:
      A transformation whose ``update`` needs ``params``. State: that of the learning rate only.

    Raises:
      ValueError, TypeError: as `scale_by_loft_adam`.

    Source: Zhang and Pilanci, ICML 2024.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"lora_a": jnp.array([[3.0], [4.0]]), "lora_b": jnp.zeros((1, 1))}
      >>> grads = {"lora_a": jnp.zeros((2, 1)), "lora_b": jnp.array([[25.0]])}
      >>> tx = scaled_sgd(0.1)
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> round(float(updates["lora_b"][0, 0]), 4)
      -0.1
    """
    precondition = precondition_by_partner(damping, pairs=pairs)
    return checked(optax.chain(precondition, optax.scale_by_learning_rate(learning_rate)), pairs)


def lora_fa(
    learning_rate: optax.ScalarOrSchedule,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-6,
    eps_root: float | jax.Array = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: float | jax.Array = 0.0,
    *,
    nesterov: bool = False,
    correct_gradient: bool = True,
    damping: float | jax.Array = 1e-8,
    frozen: FactorName = "a",
    pairs: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LoRA-FA: one factor keeps its initial value, and AdamW trains the other.

    The gradient of :math:`V` (``lora_b``) is replaced by
    :math:`s^{-2} \, \nabla_V f \, (U^\top U + \delta I)^{-1}`, so that a plain step would change
    ``W`` by :math:`-\eta \, P_U G`.

    To avoid storing activations for the gradient of the frozen factor, exclude that factor from
    differentiation in the model.

    Args:
      learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, nesterov: as in `optax.adamw`.
        The default ``eps`` is 1e-6 and the weight decay 0, where Optax's are 1e-8 and 1e-4.
      correct_gradient: False uses the factor's own gradient, as in the paper's first version.
      damping: :math:`\delta`, absolute.
      frozen: the frozen factor. It must be nonzero, or the other factor gets no gradient.
      pairs: the LoRA pairs, as in `scale_by_loft_adam`.

    Returns:
      A transformation whose ``update`` needs ``params``. State: AdamW's for the trained factor and
      the non-LoRA parameters, none for the frozen one.

    Raises:
      ValueError, TypeError: as `scale_by_loft_adam`.

    Source: Zhang et al., "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models
      Fine-tuning", arXiv:2308.03303; the corrected gradient is from its second version, and is also
      PEFT's. PEFT adds epsilon before the bias correction and decays the weights after the step;
      here both are as in `optax.adamw`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = {"lora_a": jnp.ones((3, 1)), "lora_b": jnp.zeros((1, 2))}
      >>> tx = lora_fa(1e-3)
      >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
      >>> bool((updates["lora_a"] == 0).all()), bool((updates["lora_b"] < 0).all())
      (True, True)
    """
    check_factor_name(frozen, "frozen")
    adamw = optax.adamw(
        learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, nesterov=nesterov
    )

    def labels(params: optax.Params) -> Any:
        tree = find_pairs(params, pairs)
        frozen_at = {pair.a if frozen == "a" else pair.b for pair in tree.pairs}
        names = ["frozen" if k in frozen_at else "trained" for k in range(len(tree.leaves))]
        return tree.treedef.unflatten(names)

    # `optax.set_to_zero` would lose the sharding of Explicit axes without a mesh in context.
    zero = lambda g: jnp.where(g == g, 0, 0).astype(g.dtype)
    still = optax.stateless_with_tree_map(lambda g, _: zero(g))
    halves = optax.partition({"frozen": still, "trained": adamw}, labels)
    if not correct_gradient:
        return checked(halves, pairs)
    trained = "b" if frozen == "a" else "a"
    return checked(optax.chain(_preconditioner(damping, trained, True, pairs), halves), pairs)


def _preconditioner(
    damping: float | jax.Array, factors: str, unscale: bool, pairs: Any
) -> optax.GradientTransformationExtraArgs:
    def precondition(
        gradient: Float[Array, "m r"], partner: Spectrum, damping: Any, scale: float
    ) -> Float[Array, "m r"]:
        direction = gradient @ inverse_gram(partner, damping)
        return direction / scale / scale if unscale else direction

    @jax.default_matmul_precision("highest")
    def of_leaves(tree, params, gradients, damping):
        of_pair = functools.partial(precondition, damping=damping)
        return over_factors(tree, params, gradients, of_pair, factors)

    def init(params: optax.Params) -> optax.EmptyState:
        find_pairs(params, pairs)
        return optax.EmptyState()

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        tree, gradients = read_arguments(params, updates, pairs)
        fn = functools.partial(of_leaves, tree)
        directions = in_auto_axes(fn, tree.leaves, gradients, damping, out_like=tree.leaves)
        return tree.treedef.unflatten(directions), state

    return optax.with_extra_args_support(optax.GradientTransformation(init, update))
