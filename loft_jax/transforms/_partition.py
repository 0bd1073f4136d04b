"""One transformation for the factors of pairs, another for the leaves outside them."""

from typing import Any

import optax

from loft_jax._pairs import LoraPairs, find_pairs
from loft_jax.transforms._factors import leaves_outside, read_arguments


def factors_and_rest(
    of_factors: optax.GradientTransformation,
    of_rest: optax.GradientTransformation,
    pairs: LoraPairs | None,
) -> optax.GradientTransformationExtraArgs:
    """An `optax.partition` by `find_pairs`, with errors that name the path."""

    def labels(params: optax.Params) -> Any:
        tree = find_pairs(params, pairs)
        outside = set(leaves_outside(tree))
        names = ["rest" if k in outside else "factors" for k in range(len(tree.leaves))]
        return tree.treedef.unflatten(names)

    both = optax.partition({"factors": of_factors, "rest": of_rest}, labels)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        read_arguments(params, updates, pairs, parts=True)  # before Optax flattens them
        return both.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(both.init, update)
