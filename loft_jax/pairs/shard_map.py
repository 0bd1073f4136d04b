"""How an enclosing `jax.shard_map` shards the leaves of a tree.

Inside a shard_map a leaf is this device's shard of an array. The shard does not show whether
another device has further rows of the same factor or the factor of another layer, so the specs of
the shard_map are needed. Outside a shard_map arrays are complete, and no specs are needed.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

Split = tuple[tuple[str, ...], ...]
"""For each axis of an array the manual mesh axes over which it is sharded, major to minor."""


def find_splits(
    paths: Sequence[str], leaves: Sequence[Any], specs: Sequence[tuple[str, PartitionSpec]]
) -> tuple[Split, ...]:
    """Returns the sharding of each leaf, from the first ``(regex, spec)`` entry that matches it.

    Only manual mesh axes are included. The compiler handles the other axes, and outside a shard_map
    all axes are handled by the compiler.

    Raises:
      ValueError: a spec with a name that the mesh does not have, or for more axes than its leaf
        has; a leaf that no entry matches although there are entries; a leaf known (``check_vma``)
        to differ between devices along axes that its entry does not name.
    """
    mesh = jax.sharding.get_abstract_mesh()
    manual = set(mesh.manual_axes)
    if not manual:
        return tuple(((),) * len(jnp.shape(leaf)) for leaf in leaves)
    found = []
    for path, leaf in zip(paths, leaves, strict=True):
        spec = next((spec for regex, spec in specs if re.fullmatch(regex, path)), None)
        if spec is None and specs:
            raise ValueError(
                f"{path}: no entry of LoraPairs(specs=...) matches it; "
                "loft_jax.sharding.shard_map_pairs makes one for each parameter"
            )
        spec = PartitionSpec() if spec is None else spec
        dims = len(jnp.shape(leaf))
        entries = [axis_names(entry) for entry in spec]
        if unknown := [name for names in entries for name in names if name not in mesh.axis_names]:
            raise ValueError(
                f"{path}: {spec} names {unknown[0]!r}, which is no axis of the mesh {mesh.shape}"
            )
        if len(entries) > dims:
            raise ValueError(f"{path}: {spec} is for more axes than the {dims} that it has")
        entries += [()] * (dims - len(entries))
        if differing := sorted(varying(leaf) - {name for names in entries for name in names}):
            raise ValueError(
                f"{path} differs between the devices of the shard_map along {differing}, and "
                "LoraPairs(specs=...) does not specify how it is sharded; "
                "loft_jax.sharding.shard_map_pairs takes it from the in_specs"
            )
        found.append(tuple(tuple(name for name in names if name in manual) for names in entries))
    return tuple(found)


def axis_names(entry: Any) -> tuple[str, ...]:
    """Returns the mesh axes of an entry of a `PartitionSpec`.

    Example:
      >>> axis_names(None), axis_names("x"), axis_names(("x", "y"))
      ((), ('x',), ('x', 'y'))
    """
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def varying(leaf: Any) -> frozenset[str]:
    """Returns the manual axes along which a value is known to differ (``check_vma``)."""
    return jax.typeof(leaf).manual_axis_type.varying if isinstance(leaf, jax.Array) else frozenset()
