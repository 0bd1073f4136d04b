"""Checks of the pairs when an optimizer's state is made, against how the adapters were made."""

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
    if as_pairs(pairs).axes is None:
        _check_batch_axes(tree)
    told = as_pairs(pairs).scale
    # Also where entries are given, of which none matches: those of a rule for another model.
    untold = [
        pair
        for pair in tree.pairs
        if not is_per_tree(told) and first_match(told, tree.paths[pair.a]) is None
    ]
    made = {pair: declared_scale(tree.paths[pair.a]) for pair in untold}
    if wrong := [
        f"{tree.paths[pair.a]}: made with scale {scale:g}, the optimizer assumes {pair.scale:g}"
        for pair, scale in made.items()
        if scale is not None and not math.isclose(scale, pair.scale)
    ]:
        headline = (
            "The optimizer does not know the scale alpha / rank of these adapters, so that its "
            "steps differ by that factor. Pass pairs=rule, the LoraRule that made them, or "
            "LoraPairs(scale=...):"
        )
        warnings.warn(listing(headline, wrong), stacklevel=4)
    elif told is not None and untold and len(untold) == len(tree.pairs):
        headline = (
            "pairs= gives scales, but none for any of these adapters: the path of no LoraRule, and "
            "no regex of LoraPairs(scale=...), matches. The optimizer assumes 1. Where the adapted "
            "model is a part of a larger one, use LoraPairs(scale=...); describe_pairs shows what "
            "each pair got:"
        )
        warnings.warn(listing(headline, [tree.paths[pair.a] for pair in untold]), stacklevel=4)
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


def _check_batch_axes(tree: PairedTree) -> None:
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
