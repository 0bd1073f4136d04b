"""Finds the low-rank pairs among the leaves of a pytree, by their names.

An adapter adds ``scale * a @ b`` to a weight. Its factors are two leaves of the parameters. The
optimizers see each as a matrix ``(*batch, dimension, rank)``, whatever its layout in the tree, and
treat both factors with the same functions.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from loft_jax.algorithm.sharded_dim import UNSHARDED, ShardedDim
from loft_jax.pairs.axes import (
    FactorLayout,
    LoraAxes,
    guess_axes,
    layout_hint,
    read_layout,
    sharded_rows,
)
from loft_jax.pairs.names import weight_paths
from loft_jax.pairs.shard_map import Split, find_splits
from loft_jax.pairs.spec import as_pairs, check_scale, first_match, is_entries, is_per_tree


class Pair(NamedTuple):
    """A low-rank adapter: two leaves, by their position among the leaves of the tree.

    Attributes:
      a, b: positions of the factors.
      layout_a, layout_b: how each lies in its array.
      m, n, r: rows of ``a``, rows of ``b`` (each as a matrix), rank. In a shard_map the rows of all
        devices.
      batch: sizes of the batch axes, in a shard_map of this device's part.
      scale: the adapter's own scale.
      dim_a, dim_b: how a shard_map shards the rows.
    """

    a: int
    b: int
    layout_a: FactorLayout
    layout_b: FactorLayout
    m: int
    n: int
    r: int
    batch: tuple[int, ...]
    scale: float
    dim_a: ShardedDim = UNSHARDED
    dim_b: ShardedDim = UNSHARDED


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["leaves"],
    meta_fields=["paths", "treedef", "pairs", "splits"],
)
@dataclasses.dataclass(frozen=True)
class PairedTree:
    """A flattened pytree and the pairs in it; itself a pytree of the leaves.

    Attributes:
      paths: of the leaves, keys joined by ``/``.
      leaves: in the order of the tree.
      treedef: the structure of the tree.
      pairs: those found.
      splits: how a shard_map shards each leaf.
    """

    paths: tuple[str, ...]
    leaves: list[Any]
    treedef: Any
    pairs: tuple[Pair, ...]
    splits: tuple[Split, ...] = ()

    def sharded(self, k: int) -> ShardedDim:
        """How a shard_map shards the leaf at a position, along all of its axes together."""
        return ShardedDim(tuple(name for names in self.splits[k] for name in names))

    @property
    def others(self) -> list[int]:
        """Positions of the leaves that belong to no pair."""
        inside = {k for pair in self.pairs for k in (pair.a, pair.b)}
        return [k for k in range(len(self.leaves)) if k not in inside]


def find_pairs(params: Any, pairs: Any = None) -> PairedTree:
    """Finds the low-rank pairs among the leaves of ``params``.

    Args:
      params: a pytree of arrays or of anything with a shape and a dtype. None, `optax.MaskedNode`
        and other childless nodes are not leaves.
      pairs: what to look for: a `LoraPairs`, a `LoraRule`, a sequence of rules, None for the
        defaults.

    Raises:
      ValueError: a factor without its partner, an ambiguous one, factors whose shapes do not
        belong together, a rank above both dimensions, a weight next to its own adapter, or a tree
        without any pair. The message lists the paths and the remedy.
      TypeError: a leaf that is not a real floating-point array; ``pairs`` of another type.

    Example:
      >>> params = {"q": {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.zeros((2, 4))}}
      >>> (pair,) = find_pairs(params).pairs
      >>> pair.m, pair.n, pair.r
      (6, 4, 2)
    """
    spec = as_pairs(pairs)
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = tuple(path_string(path) for path, _ in with_paths)
    leaves = [leaf for _, leaf in with_paths]
    if not leaves:
        # `optax.tree_map_params` calls init with a childless placeholder, which is no container.
        if spec.required and (params is None or isinstance(params, (Mapping, list, tuple))):
            raise ValueError(
                "There are no parameters. With Flax NNX pass wrt=nnx.LoRAParam after add_lora has "
                "put adapters on the model; LoraPairs(required=False) accepts an empty tree"
            )
        return PairedTree(paths, leaves, treedef, ())
    _check_dtypes(paths, leaves)
    splits = find_splits(paths, leaves, spec.specs)
    axes_of, scale_of = _per_pair(spec.axes, params, "axes"), _per_pair(spec.scale, params, "scale")
    found, problems = [], []
    for a, b in match_names(paths, spec.rules, spec.required):
        scale = scale_of(paths[a])
        try:
            scale = 1.0 if scale is None else check_scale(scale)
            found.append(read_pair(a, b, paths, leaves, splits, axes_of(paths[a]), scale))
        except ValueError as error:
            problem = str(error)
            problems.append(problem if paths[a] in problem else f"{paths[a]}: {problem}")
    if problems:
        raise ValueError(listing("These low-rank factors cannot be read:", problems))
    tree = PairedTree(paths, leaves, treedef, tuple(found), splits)
    if not spec.train_weights and (weights := adapted_weights(tree)):
        headline = (
            "These weights lie next to their own adapters and would be trained too. Pass the "
            "adapters alone: nnx.state(model, nnx.LoRAParam) of an nnx model (wrt=nnx.LoRAParam in "
            "nnx.Optimizer), or the first result of loft_jax.adapters.split; optax.masked also "
            "hides them. LoraPairs(train_weights=True) trains both:"
        )
        raise ValueError(listing(headline, weights))
    return tree


def _per_pair(value: Any, params: Any, name: str) -> Any:
    """Returns the function from the path of ``a`` to its value."""
    is_tree = is_per_tree(value)
    if callable(value):
        value = value(params)
        # What it returns may be a tree with a list or a tuple at its root, as the parameters.
        is_tree = is_per_tree(value) or (isinstance(value, (list, tuple)) and not is_entries(value))
    if not is_tree:
        return lambda path: first_match(value, path)
    is_leaf = lambda x: x is None or isinstance(x, LoraAxes)
    try:
        told = jax.tree.broadcast(value, params, is_leaf=is_leaf)
    except ValueError as error:
        raise ValueError(
            f"LoraPairs: {name} is a pytree that is not a prefix of the parameters: {error}"
        ) from error
    flat = jax.tree_util.tree_flatten_with_path(told, is_leaf=is_leaf)[0]
    return {path_string(path): leaf for path, leaf in flat}.get


def adapted_weights(tree: PairedTree) -> list[str]:
    """Returns the paths of the weights in a tree that have an adapter in it."""
    weights = {name for pair in tree.pairs for name in weight_paths(tree.paths[pair.a])}
    return sorted(weights.intersection(tree.paths))


def path_string(path: Sequence[Any]) -> str:
    """Joins the keys of a pytree path by ``/``, without the ``.value`` of a Flax Variable.

    Example:
      >>> tree = {"layers": [{"lora_a": 1}]}
      >>> path_string(jax.tree_util.tree_flatten_with_path(tree)[0][0][0])
      'layers/0/lora_a'
    """
    keys = list(path)
    # nnx.Optimizer shows Variables to `init` and bare arrays to `update`.
    while keys and getattr(keys[-1], "name", None) in ("value", "raw_value"):
        keys.pop()
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def _check_dtypes(paths: Sequence[str], leaves: Sequence[Any]) -> None:
    kinds = [leaf.dtype if hasattr(leaf, "dtype") else type(leaf) for leaf in leaves]
    bad = [
        f"{path}: {getattr(kind, '__name__', kind)}"
        for path, kind in zip(paths, kinds, strict=True)
        if kind is not float
        and not (hasattr(kind, "itemsize") and jnp.issubdtype(kind, jnp.floating))
    ]
    if bad:
        raise TypeError(
            listing(
                "These parameters are not real floating-point arrays. Pass the adapters alone, "
                "without frozen or quantized weights: nnx.state(model, nnx.LoRAParam) of an nnx "
                "model (wrt=nnx.LoRAParam in nnx.Optimizer), or the first result of "
                "loft_jax.adapters.split; optax.masked or optax.partition also hide them.",
                bad,
            )
        )


def match_names(
    paths: Sequence[str], rules: Sequence[tuple[str, str]], required: bool = True
) -> list[tuple[int, int]]:
    """Returns the positions of the leaves whose names make a pair, in the order of ``a``."""
    roles: dict[int, list[tuple[tuple, str]]] = {}
    members: dict[tuple, dict[str, list[int]]] = {}
    for number, rule in enumerate(rules):
        for role, regex in zip("ab", rule, strict=True):
            for position, path in enumerate(paths):
                if match := re.fullmatch(regex, path):
                    key = (number, *match.groups())
                    roles.setdefault(position, []).append((key, role))
                    members.setdefault(key, {"a": [], "b": []})[role].append(position)
    problems = [
        f"{paths[position]}: matched {len(taken)} times; make the rules exclusive"
        for position, taken in roles.items()
        if len(taken) > 1
    ]
    for key, factors in members.items():
        for role, other in ("ab", "ba"):
            if not factors[other]:
                wanted = rules[key[0]]["ab".index(other)]
                problems += [f"{paths[p]}: no partner matches {wanted!r}" for p in factors[role]]
        if len(factors["a"]) > 1 or len(factors["b"]) > 1:
            names = ", ".join(paths[p] for p in (*factors["a"], *factors["b"]))
            problems.append(f"{names}: more than two leaves in one pair; give the rules groups")
    if problems:
        raise ValueError(
            listing(
                "These low-rank factors are unpaired or ambiguous. Both factors of an adapter must "
                "reach the same transformation (one label of optax.partition, one mask), under "
                "names that LoraPairs(rules=...) pairs:",
                problems,
            )
        )
    if not members and required:
        raise ValueError(
            listing(
                "No low-rank pair was found. Add adapters to the model first (add_lora, "
                "LoraModel), or name the factors with LoraPairs(rules=((regex of a, regex of "
                "b),)); LoraPairs(required=False) falls back to the update of other leaves, "
                "AdamW's in loft_adamw. The leaves are:",
                list(paths),
            )
        )
    return sorted((factors["a"][0], factors["b"][0]) for factors in members.values())


def read_pair(
    a: int,
    b: int,
    paths: Sequence[str],
    leaves: Sequence[Any],
    splits: Sequence[Split],
    axes: LoraAxes | None,
    scale: float,
) -> Pair:
    """Reads the pair of two leaves, by their positions.

    Raises:
      ValueError: shapes that do not belong together under these axes, or under any.
    """
    # Whole shapes, so that a pair reads the same inside a shard_map and outside.
    shape_a, shape_b = (
        tuple(ShardedDim(names).size(local) for names, local in zip(splits[k], shape, strict=True))
        for k, shape in ((a, jnp.shape(leaves[a])), (b, jnp.shape(leaves[b])))
    )
    where = f"{paths[a]} {shape_a}, {paths[b]} {shape_b}"
    axes = axes or guess_axes(shape_a, shape_b, where)
    layout_a = read_layout(shape_a, axes.batch, axes.rank_a, where)
    layout_b = read_layout(shape_b, axes.batch, axes.rank_b, where)
    stacked, stacked_b = (
        [s[x] for x in t.batch] for s, t in ((shape_a, layout_a), (shape_b, layout_b))
    )
    r = shape_a[layout_a.rank]
    if stacked != stacked_b or r != shape_b[layout_b.rank]:
        raise ValueError(
            f"{where}: batch axes or rank differ (a is (*batch, in, r), b is (*batch, r, out); "
            f"for other layouts use LoraPairs(axes=...)){layout_hint(shape_a, shape_b)}"
        )
    if [splits[a][axis] for axis in layout_a.batch] != [splits[b][axis] for axis in layout_b.batch]:
        raise ValueError(f"{where}: a shard_map shards their batch axes differently")
    dim_a, dim_b = (
        sharded_rows(layout, splits[k], paths[k]) for layout, k in ((layout_a, a), (layout_b, b))
    )
    m = math.prod(shape_a[axis] for axis in layout_a.rows)
    n = math.prod(shape_b[axis] for axis in layout_b.rows)
    batch = tuple(jnp.shape(leaves[a])[axis] for axis in layout_a.batch)
    if min(m, n, *batch, 1) == 0:
        raise ValueError(f"{where}: an axis of length zero leaves nothing to train")
    if r > max(m, n) or r == 0:
        raise ValueError(
            f"{where}: rank {r} must be at least 1 and at most {max(m, n)}, the larger dimension "
            f"of the {m} x {n} weight; a higher one adds nothing, so lower it. If these are not "
            "the axes of the rank, as in PyTorch's layout, use LoraPairs(axes=LoraAxes(rank_a=0, "
            "rank_b=-1))"
        )
    return Pair(a, b, layout_a, layout_b, m, n, r, batch, scale, dim_a, dim_b)


def listing(headline: str, lines: Sequence[str], most: int = 12) -> str:
    """Returns a message with a headline and the first of the lines."""
    shown = [f"  {line}" for line in lines[:most]]
    if len(lines) > most:
        shown.append(f"  and {len(lines) - most} more")
    return "\n".join([headline, *shown])
