"""Input checks with clear errors, for transformations with Optax's own state."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from loft_jax.execution.arguments import read_arguments
from loft_jax.pairs.find import PairedTree, find_pairs
from loft_jax.pairs.init_checks import warn_of_pairs


def checked(tx: optax.GradientTransformation, pairs: Any) -> optax.GradientTransformationExtraArgs:
    """Rejects unpaired parameters and gradients or states of another shape, and names the path."""
    tx = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> optax.OptState:
        warn_of_pairs(find_pairs(params, pairs), pairs)
        return tx.init(params)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        tree, _ = read_arguments(params, updates, pairs)
        check_shapes(tree, state, jax.eval_shape(tx.init, params))
        return tx.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def check_shapes(tree: PairedTree, state: Any, expected: Any) -> None:
    """Raises ValueError unless the arrays of a state have the shapes of the expected state."""
    found, wanted = _shapes(state), _shapes(expected)
    if found == wanted:
        return
    for key in (*wanted, *found):
        shape, needed = found.get(key), wanted.get(key)
        if shape == needed:
            continue
        for path, leaf in zip(tree.paths, tree.leaves, strict=True):
            if f"/{key}".endswith(f"/{path}"):
                what = "is missing" if shape is None else f"has shape {shape}, not {needed}"
                raise ValueError(
                    f"The state of {path} is not for a leaf of shape {jnp.shape(leaf)}: {key} "
                    f"{what}. After a change of rank or of the pairs, make it anew with init"
                )
        raise ValueError(
            f"The state is not that of these parameters: {key} "
            f"{'is missing' if shape is None else 'belongs to none of them'}. Make it anew with "
            "init after a change"
        )


def _shapes(state: Any) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each array of a state by path."""
    return {
        jax.tree_util.keystr(where, simple=True, separator="/"): jnp.shape(x)
        for where, x in jax.tree_util.tree_leaves_with_path(state)
    }
