"""Balanced factors, as the last transformation of a chain."""

from typing import Any

import optax

from loft_jax.execution.arguments import read_arguments
from loft_jax.execution.balance import balance_updates
from loft_jax.execution.explicit_mesh import in_auto_axes
from loft_jax.execution.rounding import narrow, widen
from loft_jax.execution.transformation import check_pairs


def balance_factors(pairs: Any = None) -> optax.GradientTransformationExtraArgs:
    r"""Moves the factors to the balanced ones of the same product, where they need it.

    The factors :math:`U V^\top` and :math:`U X (V X^{-\top})^\top` are the same adapter. This
    chooses the one whose columns are orthogonal and equally long in both factors, so that nothing
    cancels when the forward pass, or a cast for serving, rounds to bfloat16. `loft_adamw`,
    `loft_sgd` and `loft_muon` do it by themselves; this is for chains of your own, as their last
    transformation: whatever changes one update after it changes the product. Before it come
    optimizers that depend on the product alone: the cores ``scale_by_loft_*``, except for ablations
    and the diagonal moment.

    A pair is changed where the squared cosines between a column and the others add up to more than
    1/2 in either factor, or where :math:`|U|^2 |V|^2` is over :math:`8 r |U V^\top|^2`.

    Args:
      pairs: as in `scale_by_loft_adam`.

    Returns:
      A transformation without state, whose ``update`` needs ``params``. It changes both factors.

    Raises:
      ValueError, TypeError: as `scale_by_loft_adam`.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"lora_a": jnp.array([[3.0, 2.0], [0.0, 1.0]]), "lora_b": jnp.eye(2)}
      >>> none = {"lora_a": jnp.zeros((2, 2)), "lora_b": jnp.zeros((2, 2))}
      >>> tx = balance_factors()
      >>> updates, _ = tx.update(none, tx.init(params), params)
      >>> new = optax.apply_updates(params, updates)
      >>> before, after = (p["lora_a"] @ p["lora_b"] for p in (params, new))
      >>> bool(jnp.allclose(before, after, atol=1e-5))
      True
      >>> a, b = new["lora_a"], new["lora_b"]
      >>> bool(jnp.allclose(a.T @ a, b @ b.T, atol=1e-4))
      True
    """

    def init(params: optax.Params) -> optax.OptState:
        check_pairs(params, pairs)
        return optax.EmptyState()

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        tree, leaves = read_arguments(params, updates, pairs, sharded=True)
        balanced = in_auto_axes(balance_updates, tree, widen(leaves), out_like=tree.leaves)
        return tree.treedef.unflatten(narrow(balanced, leaves)), state

    return optax.with_extra_args_support(optax.GradientTransformation(init, update))
