"""State outside of LoFT that mirrors the adapter, when a renewal changes the factors.

Sums of gradients, averages of parameters and traces of updates are in the coordinates of the
factors. Nothing carries them into those of other factors.
"""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from loft_jax.optimizers.masked import is_masked, unmask
from loft_jax.pairs.find import PairedTree


def check_other_state(tree: PairedTree, state: optax.OptState, known: tuple[type, ...]) -> None:
    """Checks that nothing but LoFT's states and an empty accumulation mirrors the adapter.

    Args:
      tree: the adapter.
      state: of the whole optimizer.
      known: the types of LoFT's states.

    Raises:
      ValueError: a tree of the adapter's structure is elsewhere in the state, or
        `optax.MultiSteps` holds gradients.
    """
    like = tree.treedef.unflatten(tree.leaves)
    factors = {position for pair in tree.pairs for position in (pair.a, pair.b)}

    def is_mirror(x: Any) -> bool:
        try:
            leaves = tree.treedef.flatten_up_to(unmask(x, like))
        except (ValueError, TypeError, KeyError):
            return False
        seen = [k for k in factors if not is_masked(leaves[k])]
        shape = lambda x: getattr(x, "shape", None)
        return bool(seen) and all(shape(leaves[k]) == tree.leaves[k].shape for k in seen)

    def stop(x: Any) -> bool:
        return isinstance(x, (*known, optax.MultiStepsState)) or is_mirror(x)

    for path, node in jax.tree_util.tree_flatten_with_path(state, is_leaf=stop)[0]:
        if isinstance(node, optax.MultiStepsState):
            _check_accumulation(node)
            check_other_state(tree, node.inner_opt_state, known)
        elif not isinstance(node, known) and is_mirror(node):
            raise ValueError(
                f"The state has a tree like the adapter at {jax.tree_util.keystr(path)}, which is "
                "not of a LoFT optimizer: an average of parameters, or a sum of gradients or "
                "updates (as of optax.contrib.schedule_free, optax.ema, optax.trace). It belongs "
                "to the old factors. Take that transformation out, and make its state anew after "
                "the renewal"
            )


def _check_accumulation(state: optax.MultiStepsState) -> None:
    if isinstance(state.mini_step, jax.core.Tracer):
        return
    count = int(np.max(state.mini_step))  # of all optimizers in a stack
    if count:
        raise ValueError(
            f"optax.MultiSteps has accumulated the gradients of {count} steps, which belong "
            "to the old factors: renew right after an update, where mini_step is 0"
        )


def restart_accumulation(state: optax.OptState, adapter: optax.Params) -> optax.OptState:
    """Returns the state with empty accumulations of gradients like the adapter.

    Args:
      state: of the whole optimizer; `optax.MultiSteps` may be anywhere in it.
      adapter: with the new factors.
    """

    def restart(x: Any) -> Any:
        if not isinstance(x, optax.MultiStepsState):
            return x
        zeros = lambda old, leaf: old if is_masked(old) else jnp.zeros_like(leaf, old.dtype)
        return x._replace(
            mini_step=jnp.zeros_like(x.mini_step),
            inner_opt_state=restart_accumulation(x.inner_opt_state, adapter),
            acc_grads=jax.tree.map(zeros, x.acc_grads, adapter, is_leaf=is_masked),
        )

    return jax.tree.map(restart, state, is_leaf=lambda x: isinstance(x, optax.MultiStepsState))
