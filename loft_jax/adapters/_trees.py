"""Parameter trees with adapters in them: split, joined, merged.

Pure functions of trees of arrays, whatever framework made them and whatever the adapters are
called in it.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from loft_jax.pairs.find import Pair, find_pairs, match_names, path_string
from loft_jax.pairs.names import weight_paths
from loft_jax.pairs.spec import as_pairs


def split(params: Any, pairs: Any = None) -> tuple[dict, dict]:
    """Splits nested dicts of parameters into the adapter, to be trained, and the frozen base.

    For nnx models there is `nnx.split(model, nnx.LoRAParam, ...)`.

    Args:
      params: nested mappings (linen's variables, of `LoraModel` or qwix or any other); leaves of
        any kind, a quantized base among them.
      pairs: the names of the factors, as in the optimizers.

    Returns:
      ``adapter, base``: nested dicts with the leaves that each has, without empty branches.

    Raises:
      ValueError: no factor, or one without its partner.

    Example:
      >>> split({"q": {"kernel": 1.0, "lora_a": 2.0, "lora_b": 3.0}, "bias": 4.0})
      ({'q': {'lora_a': 2.0, 'lora_b': 3.0}}, {'q': {'kernel': 1.0}, 'bias': 4.0})
    """
    flat = _flatten(params)
    names = ["/".join(map(str, keys)) for keys in flat]
    matched = match_names(names, as_pairs(pairs).rules)
    factors = {position for pair in matched for position in pair}
    adapter = {keys: leaf for k, (keys, leaf) in enumerate(flat.items()) if k in factors}
    base = {keys: leaf for k, (keys, leaf) in enumerate(flat.items()) if k not in factors}
    return _unflatten(adapter), _unflatten(base)


def join(adapter: Any, base: Any) -> dict:
    """The parameters of which `split` made two; inverse of it.

    Raises:
      ValueError: a parameter that is in both.

    Example:
      >>> join({"q": {"lora_a": 2.0}}, {"q": {"kernel": 1.0}})
      {'q': {'kernel': 1.0, 'lora_a': 2.0}}
    """
    first, second = _flatten(base), _flatten(adapter)
    if both := first.keys() & second.keys():
        path = "/".join(map(str, min(both, key=str)))
        raise ValueError(f"{path} is in the adapter and in the base")
    return _unflatten(first | second)


def merge(
    base: Any,
    adapter: Any,
    pairs: Any = None,
    *,
    weights: Sequence[tuple[str, str]] = (),
    transpose: Sequence[tuple[str, Sequence[int]]] = (),
) -> Any:
    """Adds each adapter's product to its base weight: ``W + scale * a @ b``.

    Args:
      base: a pytree that holds the base weights. What else it holds (factors too) stays.
      adapter: a pytree that holds the factors. It may be the same tree as `base`.
      pairs: names, axes and scale of the factors, as in the optimizers. The scale matters here.
      weights: ``(regex of the path of a, path of its weight)`` for names that are none of those
        of Flax, qwix, gemma.peft, MaxText or Keras; the path may refer to the regex's groups.
      transpose: ``(regex of the path of a, permutation)``, which takes the axes of the product,
        (*batch, *rows of a, *rows of b), to those of the weight: where the shapes leave a doubt,
        and for einsum kernels with an output before inputs of its size, or a batch axis that is
        not first (a weight with one output axis is read as (*batch, *inputs, output)).

    Returns:
      `base` with the merged weights, each in its own dtype (the sum is formed in float32 or
      wider). Merged weights in float32 differ from unmerged ones by their rounding, about 1e-7 of
      the weight; in bfloat16 an adapter can be smaller than the rounding.

    Raises:
      ValueError: a factor without its partner or without a floating-point weight (a quantized
        one is not merged into), or shapes that do not fit or fit in more than one way. The
        message names the path and the remedy.

    Example:
      >>> params = {"q": {"kernel": jnp.zeros((3, 2)), "lora_a": jnp.ones((3, 1)),
      ...                 "lora_b": jnp.ones((1, 2))}}
      >>> adapter, base = split(params)
      >>> merge(base, adapter, LoraPairs(scale=2.0))["q"]["kernel"].tolist()
      [[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]]
    """
    return _add_products(base, adapter, pairs, weights, transpose, sign=1)


def unmerge(
    base: Any,
    adapter: Any,
    pairs: Any = None,
    *,
    weights: Sequence[tuple[str, str]] = (),
    transpose: Sequence[tuple[str, Sequence[int]]] = (),
) -> Any:
    """Takes each adapter's product out of its base weight again: ``W - scale * a @ b``.

    Arguments, result and errors are those of `merge`, whose inverse it is up to rounding.

    Example:
      >>> base = {"q": {"kernel": jnp.full((3, 2), 2.0)}}
      >>> adapter = {"q": {"lora_a": jnp.ones((3, 1)), "lora_b": jnp.ones((1, 2))}}
      >>> unmerge(base, adapter, LoraPairs(scale=2.0))["q"]["kernel"].tolist()
      [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    """
    return _add_products(base, adapter, pairs, weights, transpose, sign=-1)


def _add_products(base, adapter, pairs, weights, transpose, sign: int) -> Any:
    # `adapter` may hold the weights too.
    tree = find_pairs(adapter, dataclasses.replace(as_pairs(pairs), train_weights=True))
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(base)
    leaves = [leaf for _, leaf in with_paths]
    position = {path_string(path): k for k, (path, _) in enumerate(with_paths)}
    for pair in tree.pairs:
        path = tree.paths[pair.a]
        told = [match.expand(to) for regex, to in weights if (match := re.fullmatch(regex, path))]
        candidates = told or weight_paths(path)
        k = next((position[name] for name in candidates if name in position), None)
        if k is None or not jnp.issubdtype(leaves[k].dtype, jnp.floating):
            raise ValueError(
                f"{path}: there is no floating-point weight at {' or '.join(candidates) or path}. "
                "Name it with weights=((regex of a, path),); a quantized weight is not merged "
                "into: keep the adapter beside it"
            )
        weight = leaves[k]
        order = next((to for regex, to in transpose if re.fullmatch(regex, path)), None)
        wide = jnp.promote_types(weight.dtype, jnp.float32)
        product = _product(pair, tree.leaves[pair.a].astype(wide), tree.leaves[pair.b].astype(wide))
        product = _arrange(product, pair, tuple(weight.shape), order, path)
        leaves[k] = (weight + sign * pair.scale * product).astype(weight.dtype)
    return jax.tree.unflatten(treedef, leaves)


def _product(pair: Pair, a: jax.Array, b: jax.Array) -> jax.Array:
    """``a b`` with the axes (*batch, *rows of a, *rows of b)."""
    rows_a = [a.shape[axis] for axis in pair.layout_a.rows]
    rows_b = [b.shape[axis] for axis in pair.layout_b.rows]
    tall_a, tall_b = pair.layout_a.matricize(a), pair.layout_b.matricize(b)
    product = jnp.einsum("...mr,...nr->...mn", tall_a, tall_b, precision="highest")
    return product.reshape(*pair.batch, *rows_a, *rows_b)


def _arrange(
    product: jax.Array,
    pair: Pair,
    shape: tuple[int, ...],
    order: Sequence[int] | None,
    path: str,
) -> jax.Array:
    """The product with the axes of the weight.

    Flax's kernels have their inputs before their one output, so that order counts where it fits.
    Einsum kernels may have several outputs and interleave the two, which the shapes tell unless
    sizes are equal. Batch axes are where the factors have them.
    """
    if order is not None:
        fits = [tuple(order)]
    else:
        batch, rows_a = len(pair.batch), len(pair.layout_a.rows)
        canonical = list(range(batch, product.ndim))
        for axis, place in enumerate(pair.layout_a.batch):
            canonical.insert(place, axis)
        matches = lambda to: _permuted(product.shape, to) == shape
        rows_b = product.ndim - batch - rows_a
        plain = rows_b == 1 and (rows_a == 1 or matches(canonical))
        if plain or len(shape) != product.ndim:
            fits = [tuple(canonical)]  # also axes that qwix has made one of several
        else:
            sides = (range(batch, batch + rows_a), range(batch + rows_a, product.ndim))
            orders = [list(order) for order in _interleavings(sides)]
            for order in orders:
                for axis, place in enumerate(pair.layout_a.batch):
                    order.insert(place, axis)
            fits = [tuple(order) for order in orders if matches(order)]
    if len(fits) != 1:
        raise ValueError(
            f"{path}: the axes {product.shape} of the product fit a weight of {shape} in "
            f"{len(fits)} ways {fits}: say transpose=((regex of a, permutation),)"
        )
    arranged = product.transpose(fits[0])
    if arranged.shape != shape:
        # One axis of a factor may stand for several of the weight, never across the two sides.
        sizes = (*pair.batch, pair.m, pair.n)
        if pair.layout_a.batch != tuple(range(len(pair.batch))) or not _refines(shape, sizes):
            raise ValueError(
                f"{path}: a product of {arranged.shape} does not fit a weight of {shape}; does "
                "the adapter belong to another model, or is the weight (out, in)? Then say "
                "transpose=((regex of a, permutation),)"
            )
    return arranged.reshape(shape)


def _permuted(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in order)


def _interleavings(groups: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """All orders of the groups' members that keep the order within each group."""
    labels = [k for k, group in enumerate(groups) for _ in group]
    orders = []
    for arrangement in sorted(set(itertools.permutations(labels))):
        members = [iter(group) for group in groups]
        orders.append(tuple(next(members[label]) for label in arrangement))
    return orders


def _refines(shape: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether consecutive axes of `shape` multiply to `sizes`, in order."""
    ends = set(itertools.accumulate(shape, initial=1, func=lambda x, y: x * y))
    wanted = itertools.accumulate(sizes, func=lambda x, y: x * y)
    return math.prod(shape) == math.prod(sizes) and all(end in ends for end in wanted)


def _flatten(tree: Any) -> dict[tuple, Any]:
    if not isinstance(tree, Mapping):
        raise TypeError(f"nested mappings of parameters are expected, got a {type(tree).__name__}")
    flat: dict[tuple, Any] = {}
    for key, value in tree.items():
        inner = _flatten(value) if isinstance(value, Mapping) else {(): value}
        flat |= {(key, *keys): leaf for keys, leaf in inner.items()}
    return flat


def _unflatten(flat: Mapping[tuple, Any]) -> dict:
    tree: dict = {}
    for keys, leaf in flat.items():
        place = tree
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = leaf
    return tree
