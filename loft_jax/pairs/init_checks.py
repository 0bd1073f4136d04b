"""Checks of the pairs against how the adapters were made, when a state is made or they are read."""

import math
import warnings
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from loft_jax.pairs.axes import LoraAxes
from loft_jax.pairs.declared import declared_batch, declared_scale
from loft_jax.pairs.find import Pair, PairedTree, listing, read_pair
from loft_jax.pairs.spec import as_pairs, first_match, is_per_tree


def warn_of_pairs(tree: PairedTree, pairs: Any = None) -> None:
    """Warns of what trains differently than the user expects, or not at all.

    A scale that the optimizer does not know is another step size. A pair whose factors are both
    zero never moves. Called once, when an optimizer's state is made.

    Raises:
      ValueError: the axes were read from the shapes, and otherwise than the adapter was made.
    """
    check_as_made(tree, pairs, "The optimizer", "its steps differ", stacklevel=5)
    if zero := [
        tree.paths[pair.a]
        for pair in tree.pairs
        if _is_zero(tree.leaves[pair.b]) and _is_zero(tree.leaves[pair.a])
    ]:
        headline = (
            "Both factors of these pairs are zero, so that neither has a gradient and no optimizer "
            "moves them. Initialize one of the two with random numbers:"
        )
        warnings.warn(listing(headline, zero), stacklevel=4)


def check_as_made(
    tree: PairedTree, pairs: Any, reader: str, consequence: str, *, stacklevel: int
) -> None:
    """Compares what is read without the user's word with how the adapters were made.

    Args:
      tree: the pairs, read with ``pairs``.
      pairs: what the user specified.
      reader: who reads them, the subject of the message.
      consequence: what differs by the scale.
      stacklevel: of the user's call, counted from here.

    Raises:
      ValueError: the axes were read from the shapes, and otherwise than the adapter was made.
    """
    check_batch_axes(tree, pairs)
    told = as_pairs(pairs).scale
    # Also where entries are given, of which none matches: those of a rule for another model.
    untold = [
        pair
        for pair in tree.pairs
        if not is_per_tree(told) and first_match(told, tree.paths[pair.a]) is None
    ]
    made = {pair: declared_scale(tree.paths[pair.a]) for pair in untold}
    if wrong := [
        f"{tree.paths[pair.a]}: made with scale {scale:g}, {pair.scale:g} is assumed"
        for pair, scale in made.items()
        if scale is not None and not math.isclose(scale, pair.scale)
    ]:
        headline = (
            f"{reader} does not know the scale alpha / rank of these adapters, so that "
            f"{consequence} by that factor. Pass pairs=rule, the LoraRule that made them, or "
            "LoraPairs(scale=...):"
        )
        warnings.warn(listing(headline, wrong), stacklevel=stacklevel)
    elif told is not None and untold and len(untold) == len(tree.pairs):
        headline = (
            "pairs= gives scales, but none for any of these adapters: the path of no LoraRule, and "
            f"no regex of LoraPairs(scale=...), matches. {reader} assumes 1. Where the adapted "
            "model is a part of a larger one, use LoraPairs(scale=...); describe_pairs shows what "
            "each pair got:"
        )
        lines = [tree.paths[pair.a] for pair in untold]
        warnings.warn(listing(headline, lines), stacklevel=stacklevel)


def check_batch_axes(tree: PairedTree, pairs: Any) -> None:
    """Refuses axes that are read from the shapes, and otherwise than the adapters were made.

    Raises:
      ValueError: the message names the paths.
    """
    if as_pairs(pairs).axes is not None:
        return
    wrong = []
    for pair in tree.pairs:
        path, read = tree.paths[pair.a], pair.layout_a.batch
        made = declared_batch(path)
        if made is not None and sorted(made) != sorted(read) and _fits(tree, pair, made):
            wrong.append(f"{path}: made with batch axes {made}, read with {read}")
    if wrong:
        headline = (
            "The shapes of these adapters fit other batch axes than they were made with. Pass "
            "pairs=rule, a LoraRule with batch=..., or LoraPairs(axes=LoraAxes(batch=...)):"
        )
        raise ValueError(listing(headline, wrong))


def _fits(tree: PairedTree, pair: Pair, batch: tuple[int, ...]) -> bool:
    """Whether the shapes fit these batch axes; if not, the declaration is of another adapter."""
    others = set(range(len(jnp.shape(tree.leaves[pair.a])))) - set(batch)
    axes = LoraAxes(batch=batch, rank_a=max(others, default=-1))
    try:
        read_pair(pair.a, pair.b, tree.paths, tree.leaves, tree.splits, axes, pair.scale)
    except ValueError:
        return False
    return True


def _is_zero(leaf: Any) -> bool:
    """Whether an array that this process holds is all zeros."""
    known = isinstance(leaf, np.ndarray) or (
        isinstance(leaf, jax.Array)
        and not isinstance(leaf, jax.core.Tracer)
        and leaf.is_fully_addressable
    )
    return known and not np.asarray(leaf).any()
