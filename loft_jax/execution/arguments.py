"""Checks of what a user passes to `update`, with errors that name the path."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from loft_jax.pairs.find import PairedTree, find_pairs, listing, path_string

State = TypeVar("State")


def read_arguments(
    params: optax.Params | None, updates: optax.Updates, pairs: Any, *, sharded: bool = False
) -> tuple[PairedTree, list[Any]]:
    """Returns the parameters with their pairs, and the gradients in the order of their leaves.

    ``sharded`` says that the caller sums over rows of which a shard_map gives it a part.

    Raises:
      ValueError: parameters that are missing or unpaired, a gradient that is missing or has another
        shape than its parameter; leaves sharded by a shard_map, for a caller that takes none.
    """
    if params is None:
        raise ValueError(
            "LoFT works on the factors themselves: call update(grads, state, params) with params"
        )
    tree = find_pairs(params, pairs)
    if not sharded and (found := [k for k in range(len(tree.leaves)) if tree.sharded(k).axes]):
        raise ValueError(
            f"{tree.paths[found[0]]} is sharded by a shard_map, over which this optimizer does not "
            "sum: call its update outside, under jit, or use a LoFT optimizer"
        )
    gradients = leaves_like(tree, updates, "gradients")
    for path, leaf, gradient in zip(tree.paths, tree.leaves, gradients, strict=True):
        is_array = hasattr(gradient, "shape") or isinstance(gradient, float)
        if not is_array or jnp.shape(gradient) != jnp.shape(leaf):
            found = (
                f"has shape {jnp.shape(gradient)}" if is_array else f"is {type(gradient).__name__}"
            )
            raise ValueError(
                f"The gradient of {path} {found}, its parameter has shape {jnp.shape(leaf)}"
            )
    # Python numbers may be non-LoRA parameters, as in Optax.
    as_array = lambda x: jnp.asarray(x) if isinstance(x, float) else x
    leaves = [as_array(leaf) for leaf in tree.leaves]
    return dataclasses.replace(tree, leaves=leaves), [as_array(x) for x in gradients]


def leaves_like(tree: PairedTree, other: Any, name: str) -> list[Any]:
    """Returns the subtrees of ``other`` at the leaves of the parameters.

    Raises:
      ValueError: its structure is not the parameters'.
    """
    try:
        return tree.treedef.flatten_up_to(other)
    except ValueError as error:
        # Containers of other types may have the same paths: then JAX's message has to do.
        lines = _differing_paths(tree, other, name) or [str(error)[:500]]
        headline = (
            f"The {name} do not have the structure of the parameters. Take gradients with respect "
            "to the parameters that the optimizer was given, and after a change of the parameters "
            "make its state anew with init:"
        )
        raise ValueError(listing(headline, lines)) from error


def _differing_paths(tree: PairedTree, other: Any, name: str) -> list[str]:
    """Returns what only the parameters have, and what only the other tree has, one line each."""
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    found = [
        path_string(keys)
        for keys, _ in jax.tree_util.tree_leaves_with_path(other, is_leaf=is_masked)
    ]
    parents = lambda path: {path[: match.start()] for match in re.finditer("/", path)} | {path}
    above = {parent for path in found for parent in parents(path)}
    lines = [f"{path}: not in the {name}" for path in tree.paths if path not in above]
    known = set(tree.paths)
    lines += [f"{path}: only in the {name}" for path in found if not known & parents(path)]
    return lines


def state_of_type(state: Any, expected: type[State]) -> State:
    """Returns a state, unless it is not of this optimizer's type: then it raises ValueError."""
    if not isinstance(state, expected):
        raise ValueError(
            f"The state is a {type(state).__name__}, that of another optimizer; this one has a "
            f"{expected.__name__}. Use the optimizer that made it, or make it anew with init"
        )
    return state


def read_state(
    tree: PairedTree,
    fields: Sequence[Any],
    widths: Sequence[Callable[[int, int], int]],
    *,
    others: bool = True,
) -> list[list[Any]]:
    """Returns the fields of a state in the order of the parameters' leaves.

    Args:
      tree: the parameters.
      fields: the trees of the state: the basis, and each moment.
      widths: for each moment ``(rows, r) ->`` numbers of state per row of a factor.
      others: whether non-LoRA parameters have moments.

    Raises:
      ValueError: the state has not the structure or the shapes of these parameters and this method.
    """
    basis, *moments = leaves = [leaves_like(tree, field, "states") for field in fields]
    of_other = lambda k: jnp.shape(tree.leaves[k]) if others else None
    expected = {k: [None, *[of_other(k)] * len(widths)] for k in tree.others}
    for pair in tree.pairs:
        for k, layout, rows in ((pair.a, pair.layout_a, pair.m), (pair.b, pair.layout_b, pair.n)):
            shape, rank = jnp.shape(tree.leaves[k]), layout.rank
            wide = [(*shape[:rank], w(rows, pair.r), *shape[rank + 1 :]) for w in widths]
            expected[k] = [shape, *wide]
    for k, shapes in expected.items():
        found = [_shape_of_state(x) for x in (basis[k], *(m[k] for m in moments))]
        if found != shapes:
            kind = "leaf" if shapes[0] is None else "factor"
            raise ValueError(
                f"The state of {tree.paths[k]} is not for a {kind} of shape "
                f"{jnp.shape(tree.leaves[k])}: its basis and moments have shapes {found}, not "
                f"{shapes}. After a change of rank, of second_moment or of the pairs, make it anew "
                "with init"
            )
    return leaves


def _shape_of_state(x: Any) -> Any:
    """Returns the shape of an array, None for a leaf without state."""
    return getattr(x, "shape", "a subtree" if jax.tree.leaves(x) else None)


def check_rank_axes(tree: PairedTree) -> None:
    """Raises ValueError where an Explicit mesh shards the rank axis of a factor."""
    for pair in tree.pairs:
        for k, layout in ((pair.a, pair.layout_a), (pair.b, pair.layout_b)):
            sharding = getattr(jax.typeof(tree.leaves[k]), "sharding", None)
            if sharding is None or not sharding.mesh.explicit_axes:
                continue
            spec = (*sharding.spec, *[None] * (layout.rank + 1))
            if spec[layout.rank] is not None:
                raise ValueError(
                    f"{tree.paths[k]}: axis {layout.rank}, the rank, is sharded over "
                    f"{spec[layout.rank]!r}, and LoFT's state along it has another size. Leave the "
                    "rank axis unsharded: loft_jax.sharding.factor_specs gives the specs"
                )


def gradient_precision(dtype: jax.typing.DTypeLike | None) -> float:
    """Returns the relative rounding of gradients computed in a dtype, 0 for float32 and above.

    Raises:
      TypeError: not a floating-point dtype.

    Example:
      >>> gradient_precision("bfloat16") == 2.0**-8, gradient_precision("float32")
      (True, 0.0)
    """
    if dtype is None:
        return 0.0
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"gradient_dtype is a floating-point dtype, got {jnp.dtype(dtype)}")
    eps = float(jnp.finfo(dtype).eps)
    return eps / 2 if eps > float(jnp.finfo(jnp.float32).eps) else 0.0
