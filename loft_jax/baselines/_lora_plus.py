"""LoRA+: AdamW with a larger learning rate for one factor."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from loft_jax.baselines._checked import checked
from loft_jax.execution.alternation import FactorName, check_factor_name
from loft_jax.execution.arguments import leaves_like
from loft_jax.pairs.find import find_pairs


def lora_plus(
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
    ratio: float | jax.Array = 16.0,
    fast: FactorName = "b",
    pairs: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LoRA+: the zero-initialised factor has ``ratio`` times the learning rate.

    `optax.adamw` on all leaves, with the learning rate :math:`\eta` for ``lora_a`` and
    non-LoRA parameters, and :math:`\mathrm{ratio} \cdot \eta` for ``lora_b`` (its weight decay
    included).

    Args:
      learning_rate: :math:`\eta`, a number or a schedule of the step.
      b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov: as in `optax.adamw`. The
        default weight decay is 0, where Optax's is 1e-4.
      ratio: the ratio of the two learning rates; the paper recommends about 16.
      fast: the factor with the larger learning rate.
      pairs: the LoRA pairs, as in `scale_by_loft_adam`.

    Returns:
      A transformation whose ``update`` needs ``params``. State: AdamW's, ``2 r`` numbers per row.

    Raises:
      ValueError, TypeError: as `scale_by_loft_adam`.

    Source: Hayou, Ghosh and Yu, "LoRA+: Efficient Low Rank Adaptation of Large Models", ICML 2024.
      The released code also gives one-dimensional parameters the larger learning rate and
      embeddings a separate one. Use `optax.partition` for these.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = {"lora_a": jnp.ones((3, 1)), "lora_b": jnp.zeros((1, 2))}
      >>> tx = lora_plus(1e-3, ratio=8.0)
      >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
      >>> float((updates["lora_b"][0, 0] / updates["lora_a"][0, 0]).round(3))
      8.0
    """
    check_factor_name(fast, "fast")
    adamw = optax.adamw(
        learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov=nesterov
    )

    def scale_fast_factors(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        tree = find_pairs(params, pairs)
        leaves = leaves_like(tree, updates, "updates")
        for pair in tree.pairs:
            k = pair.b if fast == "b" else pair.a
            leaves[k] = (ratio * leaves[k]).astype(leaves[k].dtype)
        return tree.treedef.unflatten(leaves)

    return checked(optax.chain(adamw, optax.stateless(scale_fast_factors)), pairs)
