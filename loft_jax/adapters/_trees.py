"""Splits, joins and merges parameter trees that contain adapters.

These are pure functions of trees of arrays. They work for any framework and for any names of the
factors.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from loft_jax.pairs.find import Pair, PairedTree, find_pairs, match_names, path_string
from loft_jax.pairs.init_checks import check_as_made
from loft_jax.pairs.names import weight_paths
from loft_jax.pairs.spec import as_pairs


def split(params: Any, pairs: Any = None) -> tuple[dict, dict]:
    """Splits nested dicts of parameters into the trained adapter and the frozen base.

    For nnx models use `nnx.split(model, nnx.LoRAParam, ...)`.

    Args:
      params: nested mappings, such as the variables of a linen model. The leaves may be of any
        type, including those of a quantized base.
      pairs: the names of the factors; a `LoraPairs`, a `LoraRule` or a sequence of these, as in
        the optimizers.

    Returns:
      ``adapter, base``: nested dicts of the leaves of each, without empty branches.

    Raises:
      ValueError: there is no factor, or one without its partner.
      TypeError: `params` is not a mapping.

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
    """Joins an adapter and a base into one tree; the inverse of `split`.

    Args:
      adapter: nested mappings of the factors.
      base: nested mappings of all other parameters.

    Returns:
      Nested dicts of the leaves of both.

    Raises:
      ValueError: both trees have the same parameter.
      TypeError: a tree is not a mapping.

    Example:
      >>> join({"q": {"lora_a": 2.0}}, {"q": {"kernel": 1.0}})
      {'q': {'kernel': 1.0, 'lora_a': 2.0}}
    """
    first, second = _flatten(base), _flatten(adapter)
    if both := first.keys() & second.keys():
        path = "/".join(map(str, min(both, key=str)))
        raise ValueError(f"{path} is in both the adapter and the base")
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
      base: a pytree that contains the base weights. Its other leaves, also factors, are kept.
      adapter: a pytree that contains the factors. It may be the same tree as `base`.
      pairs: names, axes and scale of the factors, as in the optimizers: a `LoraPairs`, or the
        `LoraRule` with which the model was adapted. The scale changes the result. None is a scale
        of 1, with a warning for adapters that are known to be scaled otherwise.
      weights: ``(regex of the path of a, path of its weight)`` entries, for names other than those
        of Flax, qwix, gemma.peft, MaxText and Keras. The path may refer to groups of the regex.
      transpose: ``(regex of the path of a, permutation)`` entries. The permutation takes the axes
        of the product, ``(*batch, *rows of a, *rows of b)``, to those of the weight. Use it if an
        error asks for it, and for einsum kernels with an output axis before input axes of the same
        size or with a batch axis that is not first. By default a weight with one output axis is
        read as ``(*batch, *inputs, output)``.

    Returns:
      `base` with merged weights, each in its own dtype; sums are computed in float32 or wider. In
      float32, merging rounds the model's weights by about 1e-7 relative. In bfloat16, an adapter
      can be smaller than the rounding.

    Raises:
      ValueError: a factor has no partner or no floating-point weight (a quantized weight cannot be
        merged into), or the shapes fit in no way or in several. The message names the path and
        says what to do.

    Example:
      >>> from loft_jax import LoraPairs
      >>> params = {"q": {"kernel": jnp.zeros((3, 2)), "lora_a": jnp.ones((3, 1)),
      ...                 "lora_b": jnp.ones((1, 2))}}
      >>> adapter, base = split(params)
      >>> merge(base, adapter, LoraPairs(scale=2.0))["q"]["kernel"].tolist()
      [[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]]
    """
    check_as_made(
        find_with_weights(adapter, pairs), pairs, "merge", "the weights differ", stacklevel=3
    )
    return add_products(base, [(1, adapter)], pairs, weights, transpose)


def unmerge(
    base: Any,
    adapter: Any,
    pairs: Any = None,
    *,
    weights: Sequence[tuple[str, str]] = (),
    transpose: Sequence[tuple[str, Sequence[int]]] = (),
) -> Any:
    """Subtracts each adapter's product from its base weight: ``W - scale * a @ b``.

    It is the inverse of `merge` up to rounding.

    Args:
      base, adapter, pairs, weights, transpose: as in `merge`.

    Returns:
      `base` with the unmerged weights.

    Raises:
      ValueError: as `merge`.

    Example:
      >>> from loft_jax import LoraPairs
      >>> base = {"q": {"kernel": jnp.full((3, 2), 2.0)}}
      >>> adapter = {"q": {"lora_a": jnp.ones((3, 1)), "lora_b": jnp.ones((1, 2))}}
      >>> unmerge(base, adapter, LoraPairs(scale=2.0))["q"]["kernel"].tolist()
      [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    """
    check_as_made(
        find_with_weights(adapter, pairs), pairs, "unmerge", "the weights differ", stacklevel=3
    )
    return add_products(base, [(-1, adapter)], pairs, weights, transpose)


def find_with_weights(adapter: Any, pairs: Any) -> PairedTree:
    """Finds the pairs of an adapter, which may contain the weights too."""
    return find_pairs(adapter, dataclasses.replace(as_pairs(pairs), train_weights=True))


def add_products(
    base: Any,
    terms: Sequence[tuple[int, Any]],
    pairs: Any,
    weights: Sequence[tuple[str, str]],
    transpose: Sequence[tuple[str, Sequence[int]]],
) -> Any:
    """Adds the products of adapters of one structure to their base weights, rounding once.

    Args:
      base, pairs, weights, transpose: as in `merge`.
      terms: ``(sign, adapter)`` entries; the ranks of the adapters may differ.
    """
    signs = [sign for sign, _ in terms]
    trees = [find_with_weights(adapter, pairs) for _, adapter in terms]
    tree = trees[0]
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(base)
    leaves = [leaf for _, leaf in with_paths]
    position = {path_string(path): k for k, (path, _) in enumerate(with_paths)}
    by_path = {name: leaves[k] for name, k in position.items()}
    for pair in tree.pairs:
        path = tree.paths[pair.a]
        k = position[find_weight(path, by_path, weights)]
        weight = leaves[k]
        order = next((to for regex, to in transpose if re.fullmatch(regex, path)), None)
        wide = jnp.promote_types(weight.dtype, jnp.float32)
        product = jnp.zeros([], wide)
        for sign, of in zip(signs, trees, strict=True):
            a, b = (of.leaves[position].astype(wide) for position in (pair.a, pair.b))
            product += sign * _product(pair, a, b)
        product = _arrange(product, pair, tuple(weight.shape), order, path)
        leaves[k] = (weight + pair.scale * product).astype(weight.dtype)
    return jax.tree.unflatten(treedef, leaves)


def find_weight(path: str, leaves: Mapping[str, Any], weights: Sequence[tuple[str, str]]) -> str:
    """Returns the path of the base weight of an adapter.

    Args:
      path: of the factor ``a``.
      leaves: the base by path.
      weights: as in `merge`.

    Raises:
      ValueError: there is none, or none that an adapter can be merged into.
    """
    given = [match.expand(to) for regex, to in weights if (match := re.fullmatch(regex, path))]
    candidates = given or weight_paths(path)
    name = next((name for name in candidates if name in leaves), None)
    # A float8 is a quantized weight too.
    can_merge = lambda dtype: jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize >= 2
    if name is None or not can_merge(leaves[name].dtype):
        raise ValueError(
            f"{path}: there is no floating-point weight at {' or '.join(candidates) or path}. "
            "Specify it with weights=((regex of a, path),). A quantized weight cannot be "
            "merged into: keep its adapter separate, and to renew it or change its rank "
            "dequantize the weight first"
        )
    return name


def _product(pair: Pair, a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns ``a b`` with the axes ``(*batch, *rows of a, *rows of b)``."""
    rows_a = [a.shape[axis] for axis in pair.layout_a.rows]
    rows_b = [b.shape[axis] for axis in pair.layout_b.rows]
    a, b = pair.layout_a.matricize(a), pair.layout_b.matricize(b)
    product = jnp.einsum("...mr,...nr->...mn", a, b, precision="highest")
    return product.reshape(*pair.batch, *rows_a, *rows_b)


def _arrange(
    product: jax.Array,
    pair: Pair,
    shape: tuple[int, ...],
    order: Sequence[int] | None,
    path: str,
) -> jax.Array:
    """Returns the product with the axes of the weight.

    Flax's kernels have their inputs before their one output, so this order is used if it fits.
    Einsum kernels may have several outputs and interleave them with inputs. The shapes determine
    the order unless sizes are equal. Batch axes have the same positions as in the factors.
    """
    if order is not None:
        fits = [tuple(order)]
    else:
        batch, rows_a = len(pair.batch), len(pair.layout_a.rows)
        canonical = list(range(batch, product.ndim))
        for axis, position in enumerate(pair.layout_a.batch):
            canonical.insert(position, axis)
        matches = lambda to: _permuted(product.shape, to) == shape
        rows_b = product.ndim - batch - rows_a
        plain = rows_b == 1 and (rows_a == 1 or matches(canonical))
        if plain or len(shape) != product.ndim:
            fits = [tuple(canonical)]  # also where qwix has joined several axes into one
        else:
            rows = (range(batch, batch + rows_a), range(batch + rows_a, product.ndim))
            orders = [list(order) for order in _interleavings(rows)]
            for order in orders:
                for axis, position in enumerate(pair.layout_a.batch):
                    order.insert(position, axis)
            fits = [tuple(order) for order in orders if matches(order)]
    if len(fits) != 1:
        raise ValueError(
            f"{path}: the product {product.shape} fits the weight {shape} in {len(fits)} ways "
            f"{fits}. Specify one with transpose=((regex of a, permutation),)"
        )
    arranged = product.transpose(fits[0])
    if arranged.shape != shape:
        # One axis of a factor may be several of the weight, but no axis belongs to both factors.
        sizes = (*pair.batch, pair.m, pair.n)
        if pair.layout_a.batch != tuple(range(len(pair.batch))) or not _refines(shape, sizes):
            raise ValueError(
                f"{path}: the product {arranged.shape} does not fit the weight {shape}. Check "
                "that the adapter belongs to this model. If the weight is (out, in), use "
                "transpose=((regex of a, permutation),)"
            )
    return arranged.reshape(shape)


def _permuted(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in order)


def _interleavings(groups: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Returns all orders of the members of the groups that keep the order within each group."""
    labels = [k for k, group in enumerate(groups) for _ in group]
    orders = []
    for arrangement in sorted(set(itertools.permutations(labels))):
        members = [iter(group) for group in groups]
        orders.append(tuple(next(members[label]) for label in arrangement))
    return orders


def _refines(shape: Sequence[int], sizes: Sequence[int]) -> bool:
    """Returns whether the products of consecutive axes of `shape` are `sizes`, in order."""
    ends = set(itertools.accumulate(shape, initial=1, func=lambda x, y: x * y))
    required = itertools.accumulate(sizes, func=lambda x, y: x * y)
    return math.prod(shape) == math.prod(sizes) and all(end in ends for end in required)


def _flatten(tree: Any) -> dict[tuple, Any]:
    if not isinstance(tree, Mapping):
        raise TypeError(f"parameters must be nested mappings, got a {type(tree).__name__}")
    flat: dict[tuple, Any] = {}
    for key, value in tree.items():
        inner = _flatten(value) if isinstance(value, Mapping) else {(): value}
        flat |= {(key, *keys): leaf for keys, leaf in inner.items()}
    return flat


def _unflatten(flat: Mapping[tuple, Any]) -> dict:
    tree: dict = {}
    for keys, leaf in flat.items():
        node = tree
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = leaf
    return tree
