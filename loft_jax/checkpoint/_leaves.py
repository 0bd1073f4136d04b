"""The leaves of a pytree by their paths: how they are recorded, compared and put back.

A checkpoint names arrays by path and holds nothing of the Python classes around them; a target
tree gives those back, and says where each array goes and in which dtype.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from loft_jax.checkpoint import _processes
from loft_jax.checkpoint._digest import digests
from loft_jax.checkpoint._errors import listing
from loft_jax.pairs.find import path_string


@dataclasses.dataclass(frozen=True)
class LeafRecord:
    """What a checkpoint says of one array.

    Attributes:
      shape, dtype: of the stored array; of a typed random key, those of its data.
      digest: see `digests`.
      key: the implementation of a typed random key, None for arrays.
    """

    shape: tuple[int, ...]
    dtype: str
    digest: str
    key: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As `from_json` reads it."""
        return dataclasses.asdict(self) | {"shape": list(self.shape)}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "LeafRecord":
        """The inverse of `to_json`."""
        return LeafRecord(tuple(value["shape"]), value["dtype"], value["digest"], value["key"])


def by_path(tree: Any, item: str) -> dict[str, Any]:
    """The leaves of a tree by their paths.

    Raises:
      ValueError: two leaves with the same path.
    """
    leaves: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = path_string(keys) or "value"  # a tree that is one leaf
        if path in leaves:
            raise ValueError(
                f"{item}: two leaves have the path {path!r}, so that one would overwrite the "
                "other; rename a key"
            )
        leaves[path] = leaf
    return leaves


def named_leaves(tree: Any, item: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The arrays of a tree by their paths, and the implementations of those that were typed keys.

    What only this process holds in a run of several (scalars made outside of jit) becomes NumPy
    arrays, of which a checkpoint keeps those of process 0.

    Raises:
      ValueError: two leaves with the same path.
      TypeError: a leaf that is no array or number.
    """
    arrays, impls = {}, {}
    for path, leaf in by_path(tree, item).items():
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(f"{item}: {path} is abstract: there are no values to save")
        if impl := key_impl(leaf):
            impls[path], leaf = impl, jax.random.key_data(leaf)
        if isinstance(leaf, jax.Array):
            local = leaf.is_fully_addressable and jax.process_count() > 1
            arrays[path] = np.asarray(leaf) if local else leaf
        elif isinstance(leaf, (np.ndarray, np.generic, bool, int, float, complex)):
            arrays[path] = np.asarray(leaf)
        else:
            raise TypeError(f"{item}: {path} is no array or number, but a {type(leaf).__name__}")
        dtype = arrays[path].dtype
        if dtype.kind in "OUSMm":
            raise TypeError(f"{item}: {path} has dtype {dtype}, which is not saved")
        if not dtype.isnative:  # read back in this machine's order of bytes
            arrays[path] = arrays[path].astype(dtype.newbyteorder("="))
    return arrays, impls


def records(arrays: Mapping[str, Any], impls: Mapping[str, str]) -> dict[str, LeafRecord]:
    """Describes and digests the arrays of `named_leaves`."""
    digest = digests(dict(arrays))
    return {
        path: LeafRecord(tuple(x.shape), np.dtype(x.dtype).name, digest[path], impls.get(path))
        for path, x in arrays.items()
    }


def key_impl(leaf: Any) -> str | None:
    """The implementation of a typed random key, which may be abstract; None for anything else."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return None
    names = []
    jax.eval_shape(lambda key: names.append(str(jax.random.key_impl(key))), _abstract(leaf))
    return names[0]


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _stored(leaf: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of the array that is stored for a leaf."""
    if key_impl(leaf):
        leaf = jax.eval_shape(jax.random.key_data, _abstract(leaf))
    elif not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    return tuple(leaf.shape), np.dtype(leaf.dtype)


def differences(saved: Mapping[str, LeafRecord], wanted: Mapping[str, Any], item: str) -> list[str]:
    """What differs between a checkpoint's arrays and the leaves of a target, in words.

    Dtypes of one kind may differ (float32 and bfloat16): they are cast. Floats and integers are not
    taken for one another.
    """
    lines = [f"{item}: {path}: wanted, but not saved" for path in wanted if path not in saved]
    lines += [f"{item}: {path}: saved, but not wanted" for path in saved if path not in wanted]
    for path in wanted:
        if path not in saved:
            continue
        record, (shape, dtype) = saved[path], _stored(wanted[path])
        impl = key_impl(wanted[path])
        if record.key != impl:
            names = [f"a {k} key" if k else "no typed key" for k in (record.key, impl)]
            lines.append(f"{item}: {path}: {names[0]} saved, {names[1]} wanted")
        elif record.shape != shape:
            lines.append(f"{item}: {path}: shape {record.shape} saved, {shape} wanted")
        elif _kind(jnp.dtype(record.dtype)) != _kind(dtype):
            lines.append(f"{item}: {path}: {record.dtype} saved, {dtype.name} wanted")
        elif jax.dtypes.canonicalize_dtype(record.dtype) != jnp.dtype(record.dtype) and not (
            _on_host(wanted[path])
        ):
            lines.append(
                f"{item}: {path}: {record.dtype} saved, which JAX cannot hold until "
                "jax.config.update('jax_enable_x64', True)"
            )
    return lines


def rank_hint(saved: Mapping[str, LeafRecord], wanted: Mapping[str, Any]) -> str | None:
    """Says so if two trees differ in one size alone, which is then the rank of the adapters."""
    if set(saved) != set(wanted):
        return None
    changes = set()
    for path in wanted:
        old, new = saved[path].shape, _stored(wanted[path])[0]
        if old == new:
            continue
        sizes = [pair for pair in zip(old, new, strict=False) if pair[0] != pair[1]]
        if len(old) != len(new) or len(sizes) != 1:
            return None
        changes.add(sizes[0])
    if len(changes) != 1:
        return None
    ((old, new),) = changes
    return f"rank {old} saved, {new} wanted"


def _kind(dtype: np.dtype) -> str:
    names = {"complex": jnp.complexfloating, "float": jnp.floating, "integer": jnp.integer}
    return next((name for name, kind in names.items() if jnp.issubdtype(dtype, kind)), "bool")


def _on_host(leaf: Any) -> bool:
    return not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct))


def read_sharding(leaf: Any) -> jax.sharding.Sharding | None:
    """Where the stored array of a target leaf is read to; None for the host.

    The host, too, is where arrays begin that are bound to no device (`optax`'s counters): read to
    one device, they could not meet arrays of a mesh in one computation.
    """
    sharding = getattr(leaf, "sharding", None)
    if sharding is None or _on_host(leaf):
        return None
    if isinstance(leaf, jax.Array) and not leaf.committed:
        return None
    if jax.process_count() > 1 and sharding.is_fully_addressable:
        return None
    if key_impl(leaf) and isinstance(sharding, NamedSharding):
        spec = [*sharding.spec, *[None] * (len(leaf.shape) - len(sharding.spec)), None]
        return NamedSharding(sharding.mesh, PartitionSpec(*spec))
    return sharding


def put_back(x: Any, leaf: Any) -> Any:
    """A stored array as the kind of leaf that the target has there, in its dtype and sharding.

    Args:
      x: what was read, on the device or the host as `read_sharding` said.
      leaf: the target's leaf.
    """
    if impl := key_impl(leaf):
        return jax.random.wrap_key_data(jnp.asarray(x), impl=impl)
    if isinstance(leaf, (bool, int, float, complex)):
        return type(leaf)(x.item())
    if isinstance(leaf, np.generic):
        return x.astype(leaf.dtype)[()]
    if isinstance(leaf, np.ndarray):
        return x.astype(leaf.dtype)
    # A number that gives way to the dtypes that it meets must go on doing so: a learning rate in
    # float32 would otherwise turn bfloat16 updates into float32.
    if getattr(leaf, "weak_type", False) and x.shape == ():
        weak, sharding = jnp.asarray(np.asarray(x).item()), read_sharding(leaf)
        if weak.dtype == leaf.dtype:
            return weak if sharding is None else jax.device_put(weak, sharding)
    return jnp.asarray(x).astype(leaf.dtype)


def check_equal_everywhere(
    named: Mapping[str, tuple[Mapping[str, Any], Any]],
    described: Mapping[str, Mapping[str, LeafRecord]],
) -> None:
    """Of what each process holds for itself, that of process 0 is saved: all must hold the same."""
    local = {
        f"{item}: {path}": described[item][path].digest
        for item, (leaves, _) in named.items()
        for path, x in leaves.items()
        if not isinstance(x, jax.Array)
    }
    if paths := _processes.differing(local):
        raise ValueError(
            listing(
                "These leaves are no global arrays, and their values differ between the processes, "
                "so that only those of process 0 would be saved. Make them under jax.jit:",
                paths,
            )
        )
