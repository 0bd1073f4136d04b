"""Clear errors around transformations whose state is Optax's own."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from loft_jax._pairs import LoraPairs, find_pairs
from loft_jax.transforms._factors import read_arguments


def checked(
    tx: optax.GradientTransformation, pairs: LoraPairs | None
) -> optax.GradientTransformationExtraArgs:
    """Refuses unpaired parameters, and gradients or a state of another shape, naming the path."""
    tx = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> optax.OptState:
        find_pairs(params, pairs)
        return tx.init(params)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        tree, _ = read_arguments(params, updates, pairs)
        found = jax.tree_util.tree_leaves_with_path(state)
        expected = jax.tree.leaves(jax.eval_shape(tx.init, params))
        shapes = [x.shape for x in expected]
        if [jnp.shape(x) for _, x in found] != shapes:
            _refuse(tree.paths, [jnp.shape(x) for x in tree.leaves], found, shapes)
        return tx.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def _refuse(
    paths: tuple[str, ...],
    shapes: list[tuple[int, ...]],
    found: list[tuple[Any, Any]],
    expected: list[tuple[int, ...]],
) -> None:
    for (where, x), shape in zip(found, expected, strict=False):
        key = jax.tree_util.keystr(where, simple=True, separator="/")
        for path, of_leaf in zip(paths, shapes, strict=True):
            if jnp.shape(x) != shape and f"/{key}".endswith(f"/{path}"):
                raise ValueError(
                    f"The state of {path} is not for a leaf of shape {of_leaf}: {key} has shape "
                    f"{jnp.shape(x)}, not {shape}. After a change of rank or of the pairs, make it "
                    "anew with init"
                )
    raise ValueError(
        "The state is not that of these parameters: make it anew with init after a change"
    )
