"""Shardings of adapters and their optimizer state on a mesh.

Each factor is sharded along the axis that it shares with its weight; its rank axis is unsharded.
A weight cannot use a mesh axis twice, so the two factors of a pair use different mesh axes. A step
of LoFT then communicates only ``r x r`` matrices and the update of the active factor. The state is
sharded like the factors.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from loft_jax.pairs.axes import FactorLayout
from loft_jax.pairs.find import Pair, find_pairs, path_string
from loft_jax.pairs.names import weight_paths
from loft_jax.pairs.shard_map import axis_names
from loft_jax.pairs.spec import LoraPairs, as_pairs

__all__ = ["adapter_shardings", "factor_specs", "shard_map_pairs", "state_shardings"]


def factor_specs(
    weight: PartitionSpec | None, *, batch: Sequence[int] = (), inputs: int = 1, outputs: int = 1
) -> tuple[PartitionSpec, PartitionSpec]:
    """Returns the specs of an adapter's factors, from the spec of its weight.

    Args:
      weight: the spec of a weight whose axes are inputs and then outputs, with the batch axes
        (stacked layers, experts) at the positions in ``batch``. It may be None or have fewer
        entries than the weight has axes; the remaining axes are unsharded.
      batch: the batch axes, which both factors have at the same positions.
      inputs: number of axes that the weight sums over: 1, or 2 for the output projection of
        attention with a kernel ``(heads, head_dim, out)``.
      outputs: number of its output axes.

    Returns:
      The specs of ``a``, ``(*inputs, rank)``, and of ``b``, ``(rank, *outputs)``, with the batch
      axes inserted. The rank is unsharded.

    Raises:
      ValueError: a spec for more axes than the weight has, or a batch axis out of range.

    Example:
      >>> from jax.sharding import PartitionSpec as P
      >>> factor_specs(P("fsdp", "tensor")) == (P("fsdp", None), P(None, "tensor"))
      True
      >>> a, b = factor_specs(P(None, "fsdp", "tensor"), batch=(0,), outputs=2)
      >>> a == P(None, "fsdp", None), b == P(None, None, "tensor", None)  # (layers, r, heads, dim)
      (True, True)
    """
    dims = len(batch) + inputs + outputs
    entries = _padded(weight, dims)
    if len(set(batch)) < len(batch) or any(not 0 <= axis < dims for axis in batch):
        raise ValueError(f"batch {tuple(batch)} names no {len(batch)} of the weight's {dims} axes")
    single = [entry for axis, entry in enumerate(entries) if axis not in batch]
    specs = []
    for factor in ([*single[:inputs], None], [None, *single[inputs:]]):
        for axis in sorted(batch):
            factor.insert(axis, entries[axis])
        specs.append(PartitionSpec(*factor))
    return specs[0], specs[1]


def adapter_shardings(adapter: Any, weights: Any, pairs: Any = None) -> Any:
    """Returns the shardings of an adapter's factors, from the shardings of the adapted weights.

    Args:
      adapter: a pytree of factors, arrays or `jax.ShapeDtypeStruct`. It may hold other leaves.
      weights: a pytree with the weights, at the paths that the adapters' library uses. Its leaves
        are `NamedSharding`, or have one (arrays, `jax.ShapeDtypeStruct`). It may be the same tree
        as ``adapter``.
      pairs: names and axes of the factors, as in the optimizers.

    Returns:
      A tree of `NamedSharding` with the structure of ``adapter``. Non-LoRA leaves are replicated,
      unless ``weights`` has them: then they keep that sharding.

    Raises:
      ValueError: no weight with a sharding; a factor whose weight is not found, or whose weight's
        spec has more axes than the factors have together; the message names the path. For weights
        whose outputs come before their inputs, use `factor_specs`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"))
      >>> kernel = NamedSharding(mesh, P("fsdp", "tensor"))
      >>> adapter = {"q": {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.ones((2, 4))}}
      >>> found = adapter_shardings(adapter, {"q": {"kernel": kernel}})
      >>> found["q"]["lora_b"].spec == P(None, "tensor")
      True
    """
    # The tree may contain the weights too.
    tree = find_pairs(adapter, dataclasses.replace(as_pairs(pairs), train_weights=True))
    is_sharding = lambda x: isinstance(x, jax.sharding.Sharding)
    flat = jax.tree_util.tree_leaves_with_path(weights, is_leaf=is_sharding)
    known = {path_string(path): _sharding_of(leaf) for path, leaf in flat}
    known = {path: sharding for path, sharding in known.items() if sharding is not None}
    if not known:
        raise ValueError("None of the weights has a NamedSharding: put them on a mesh first")
    mesh = next(iter(known.values())).mesh
    found: list[NamedSharding] = [
        known.get(path, NamedSharding(mesh, PartitionSpec())) for path in tree.paths
    ]
    for pair in tree.pairs:
        path = tree.paths[pair.a]
        names = weight_paths(path)
        weight = next((known[name] for name in names if name in known), None)
        if weight is None:
            raise ValueError(
                f"{path}: there is no sharding of its weight at {' or '.join(names) or path}; "
                "give the factors theirs with factor_specs"
            )
        try:
            specs = _specs_of_pair(pair, weight.spec)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        for k, spec in zip((pair.a, pair.b), specs, strict=True):
            found[k] = NamedSharding(weight.mesh, spec)
    return tree.treedef.unflatten(found)


def state_shardings(
    tx: optax.GradientTransformation, params: optax.Params, shardings: Any = None
) -> optax.OptState:
    """Returns the shardings of an optimizer's state: each state array is sharded as its parameter.

    Use it as ``out_shardings`` of a jitted ``tx.init``, whose state the compiler would otherwise
    replicate on every device, and as a target for checkpoints. Works for any optimizer whose state
    `optax.tree_map_params` understands, including wrapped ones.

    Args:
      tx: the optimizer.
      params: its parameters: arrays or `jax.ShapeDtypeStruct` on a mesh. Flax's boxes and
        Variables are supported.
      shardings: a tree of `NamedSharding` like ``params``, for parameters without shardings, such
        as ``flax.nnx.get_named_sharding(state, mesh)``.

    Returns:
      A tree of `NamedSharding` with the structure of ``tx.init(params)``. A state array is sharded
      as its parameter, also if it is wider (as LoFT's second moment, along the rank). Axes whose
      size the mesh axes do not divide are unsharded. Other arrays (counters) are replicated.

    Raises:
      ValueError: a parameter without a `NamedSharding`, the message names the path; another number
        of shardings than of parameters; no parameters.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax.sharding import PartitionSpec as P
      >>> from loft_jax import scale_by_loft_adam
      >>> mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"))
      >>> spec_a, spec_b = factor_specs(P("fsdp", "tensor"))
      >>> on_mesh = lambda shape, spec: jax.ShapeDtypeStruct(
      ...     shape, jnp.float32, sharding=NamedSharding(mesh, spec))
      >>> params = {"lora_a": on_mesh((6, 2), spec_a), "lora_b": on_mesh((2, 4), spec_b)}
      >>> state_shardings(scale_by_loft_adam(), params).nu["lora_b"].spec == P(None, "tensor")
      True
    """
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    given = [leaf for _, leaf in with_paths] if shardings is None else jax.tree.leaves(shardings)
    if len(given) != len(with_paths):
        raise ValueError(f"{len(given)} shardings were given for {len(with_paths)} parameters")
    found = [_sharding_of(leaf) for leaf in given]
    if missing := [path_string(p) for (p, _), s in zip(with_paths, found, strict=True) if not s]:
        raise ValueError(
            f"These parameters have no NamedSharding: {', '.join(missing[:6])}"
            f"{' and more' * (len(missing) > 6)}. Put them on a mesh (jax.device_put, or "
            "jax.ShapeDtypeStruct(..., sharding=...)), or say shardings="
        )
    if not found:
        raise ValueError("There are no parameters, and so no mesh to put a state on")
    of_params = treedef.unflatten(found)
    mesh = next(s.mesh for s in found if s is not None)
    whole = NamedSharding(mesh, PartitionSpec())

    def of_state(x: Any, sharding: NamedSharding) -> Any:
        return x if isinstance(x, optax.MaskedNode) else _for_shape(sharding, x.shape)

    return optax.tree_map_params(
        tx,
        of_state,
        jax.eval_shape(tx.init, params),
        of_params,
        transform_non_params=lambda _: whole,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )


def shard_map_pairs(params: Any, specs: Any, pairs: Any = None) -> LoraPairs:
    """Returns ``pairs`` that also describe how a `jax.shard_map` shards the parameters.

    Use it for an optimizer whose ``update`` runs inside the shard_map. There the optimizer gets
    each device's shard of a factor and sums over the shards itself, so it must know which axes are
    sharded. It is not needed under `jax.jit` alone.

    Args:
      params: the unsharded parameters, a pytree of arrays or `jax.ShapeDtypeStruct`.
      specs: the ``in_specs`` of the parameters: a tree of `PartitionSpec` like ``params``, or one
        for all.
      pairs: names, axes and scale, as in the optimizers.

    Returns:
      The value for the ``pairs`` of an optimizer. Its ``init`` may run on the unsharded parameters.

    Raises:
      ValueError: a parameter without a spec, or a spec without a parameter.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax.sharding import PartitionSpec as P
      >>> from loft_jax import loft_adamw
      >>> params = {"lora_a": jnp.ones((8, 2)), "lora_b": jnp.zeros((2, 6))}
      >>> specs = {"lora_a": P("x", None), "lora_b": P(None, None)}
      >>> tx = loft_adamw(0.1, pairs=shard_map_pairs(params, specs))
      >>> state = tx.init(params)
      >>> mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> state_specs = jax.tree.map(
      ...     lambda sharding: sharding.spec,
      ...     state_shardings(tx, params, jax.tree.map(lambda s: NamedSharding(mesh, s), specs)))
      >>> update = jax.shard_map(tx.update, mesh=mesh, in_specs=(specs, state_specs, specs),
      ...                        out_specs=(specs, state_specs))
      >>> updates, state = jax.jit(update)(params, state, params)
      >>> updates["lora_b"].shape
      (2, 6)
    """
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    if isinstance(specs, PartitionSpec):
        specs = treedef.unflatten([specs] * len(with_paths))
    given = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    if len(given) != len(with_paths) or any(not isinstance(x, PartitionSpec) for x in given):
        raise ValueError(
            f"{len(with_paths)} parameters need a tree of as many PartitionSpec, got {specs}"
        )
    entries = tuple(
        (re.escape(path_string(path)), spec)
        for (path, _), spec in zip(with_paths, given, strict=True)
    )
    return dataclasses.replace(as_pairs(pairs), specs=entries)


def _for_shape(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """Adapts a sharding to an array of another shape; axes it does not divide are unsharded."""
    if len(sharding.spec) > len(shape):  # such as Adafactor's sums of rows
        return NamedSharding(sharding.mesh, PartitionSpec())
    parts = [math.prod(sharding.mesh.shape[n] for n in axis_names(e)) for e in sharding.spec]
    if all(length % count == 0 for length, count in zip(shape, parts, strict=False)):
        return sharding
    divisible = [
        entry if length % count == 0 else None
        for entry, length, count in zip(sharding.spec, shape, parts, strict=False)
    ]
    return NamedSharding(sharding.mesh, PartitionSpec(*divisible))


def _specs_of_pair(pair: Pair, weight: PartitionSpec) -> tuple[PartitionSpec, PartitionSpec]:
    inputs, outputs = len(pair.layout_a.rows), len(pair.layout_b.rows)
    of_a, of_b = factor_specs(weight, batch=pair.layout_a.batch, inputs=inputs, outputs=outputs)
    return _with_rank_at(pair.layout_a, of_a, -1), _with_rank_at(pair.layout_b, of_b, 0)


def _with_rank_at(layout: FactorLayout, spec: PartitionSpec, rank: int) -> PartitionSpec:
    """Moves the rank entry, the ``rank``-th of the non-batch axes, to the layout's rank axis."""
    entries = _padded(spec, len(layout.batch) + len(layout.rows) + 1)
    rows = [entry for axis, entry in enumerate(entries) if axis not in layout.batch]
    del rows[rank]
    for axis, entry in zip((*layout.rows, layout.rank), (*rows, None), strict=True):
        entries[axis] = entry
    return PartitionSpec(*entries)


def _sharding_of(leaf: Any) -> NamedSharding | None:
    sharding = leaf if isinstance(leaf, NamedSharding) else getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def _padded(spec: PartitionSpec | None, dims: int) -> list[Any]:
    """Returns the entries of a spec, padded with None to ``dims`` axes.

    Raises:
      ValueError: the spec has more entries.
    """
    entries = [] if spec is None else list(spec)
    if len(entries) > dims:
        raise ValueError(
            f"{spec} is for more axes than the {dims} that the factors have between them"
        )
    return entries + [None] * (dims - len(entries))
