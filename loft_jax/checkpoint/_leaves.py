"""Leaves of a pytree by path: recording, comparing and restoring them.

A checkpoint stores arrays by path, without the Python classes around them. The target tree supplies
the classes, and the dtype and sharding of each array.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from loft_jax.checkpoint import _processes
from loft_jax.checkpoint._digest import begin_digests
from loft_jax.checkpoint._errors import listing
from loft_jax.pairs.find import path_string

# What Orbax can store.
_FLOAT8 = ("e3m4", "e4m3b11fnuz", "e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")
_STORABLE = {
    "bool",
    *(f"int{bits}" for bits in (2, 4, 8, 16, 32, 64)),
    *(f"uint{bits}" for bits in (8, 16, 32, 64)),
    *(f"float8_{kind}" for kind in _FLOAT8),
    *("float4_e2m1fn", "bfloat16", "float16", "float32", "float64", "complex64", "complex128"),
}


@dataclasses.dataclass(frozen=True)
class LeafRecord:
    """The record of one stored array.

    Attributes:
      shape, dtype: those of the stored array; for a typed random key, those of its data.
      digest: see `digests`.
      key: the implementation of a typed random key; None for arrays.
    """

    shape: tuple[int, ...]
    dtype: str
    digest: str
    key: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object that `from_json` reads."""
        # Field by field, in a fifth of the time of dataclasses.asdict.
        return {
            "shape": list(self.shape),
            "dtype": self.dtype,
            "digest": self.digest,
            "key": self.key,
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "LeafRecord":
        """Inverse of `to_json`."""
        return LeafRecord(tuple(value["shape"]), value["dtype"], value["digest"], value["key"])


def by_path(tree: Any, item: str) -> dict[str, Any]:
    """Returns the leaves of a tree by path.

    Raises:
      ValueError: two leaves have the same path.
    """
    leaves: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = path_string(keys) or "value"  # a tree that is one leaf
        if path in leaves:
            raise ValueError(
                f"{item}: two leaves have the path {path!r}, and one would overwrite the other. "
                "Rename a key."
            )
        leaves[path] = leaf
    return leaves


def options_by_path(tree: Any) -> dict[str, str]:
    """Returns the options in a tree as text, by path.

    Options are this package's NamedTuples without leaves, such as those of `ScaleByLoftAdamState`.
    They determine what the arrays beside them mean, in states of equal paths and shapes.
    """
    is_options = lambda x: (
        isinstance(x, tuple)
        and type(x).__module__.startswith("loft_jax.")
        and not jax.tree.leaves(x)
    )
    found = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_options)[0]
    return {path_string(keys) or "value": str(x) for keys, x in found if is_options(x)}


def named_leaves(
    tree: Any, item: str, *, stored: bool = True
) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the arrays of a tree by path, and the implementations of typed keys by path.

    In a multi-process run, arrays that are local to a process (such as scalars created outside of
    jit) become NumPy arrays. A checkpoint keeps those of process 0. With ``stored=False`` they are
    only digested, so that any dtype is allowed, as the integers of a quantized base.

    Raises:
      ValueError: two leaves have the same path, or a leaf was donated.
      TypeError: a leaf is not an array or a number, or has a dtype that cannot be stored.
    """
    arrays, impls = {}, {}
    for path, leaf in by_path(tree, item).items():
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(f"{item}: {path} is abstract and has no values to save")
        if isinstance(leaf, jax.Array) and leaf.is_deleted():
            raise ValueError(
                f"{item}: {path} was deleted: it was donated to a step. Save what the step returned"
            )
        if impl := key_impl(leaf):
            impls[path], leaf = impl, jax.random.key_data(leaf)
        if isinstance(leaf, jax.Array):
            local = leaf.is_fully_addressable and jax.process_count() > 1
            arrays[path] = np.asarray(leaf) if local else leaf
        elif isinstance(leaf, (np.ndarray, np.generic, bool, int, float, complex)):
            arrays[path] = np.asarray(leaf)
        else:
            raise TypeError(
                f"{item}: {path} is not an array or a number, but a {type(leaf).__name__}"
            )
        dtype = arrays[path].dtype
        if stored and dtype.name not in _STORABLE:
            raise TypeError(f"{item}: {path} has dtype {dtype}, which cannot be saved")
        if not dtype.isnative:  # stored in this machine's byte order
            arrays[path] = arrays[path].astype(dtype.newbyteorder("="))
    return arrays, impls


def records(arrays: Mapping[str, Any], impls: Mapping[str, str]) -> dict[str, LeafRecord]:
    """Returns the records of the arrays of `named_leaves`."""
    return begin_records(arrays, impls)()


def begin_records(
    arrays: Mapping[str, Any], impls: Mapping[str, str]
) -> Callable[[], dict[str, LeafRecord]]:
    """Begins to compute digests: returns a function that waits for them. Otherwise as `records`."""
    digests = begin_digests(dict(arrays))
    described = {path: (tuple(x.shape), np.dtype(x.dtype).name) for path, x in arrays.items()}

    def finish() -> dict[str, LeafRecord]:
        digest = digests()
        return {
            path: LeafRecord(shape, dtype, digest[path], impls.get(path))
            for path, (shape, dtype) in described.items()
        }

    return finish


def key_impl(leaf: Any) -> str | None:
    """Returns the implementation of a typed random key, also an abstract one; None otherwise."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return None
    names = []
    jax.eval_shape(lambda key: names.append(str(jax.random.key_impl(key))), _abstract(leaf))
    return names[0]


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _stored(leaf: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Returns the shape and dtype of the array that is stored for a leaf."""
    if key_impl(leaf):
        leaf = jax.eval_shape(jax.random.key_data, _abstract(leaf))
    elif not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    return tuple(leaf.shape), np.dtype(leaf.dtype)


def differences(saved: Mapping[str, LeafRecord], wanted: Mapping[str, Any], item: str) -> list[str]:
    """Returns the differences between the stored arrays and the target's leaves, one line each.

    Dtypes of one kind, such as float32 and bfloat16, are cast and do not count as different. Floats
    and integers do.
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
                f"{item}: {path}: {record.dtype} saved, for which JAX needs "
                "jax.config.update('jax_enable_x64', True)"
            )
    return lines


def options_differences(
    saved: Mapping[str, str] | None, wanted: Mapping[str, str], item: str
) -> list[str]:
    """Returns the differences between the recorded options and the target's, one line each.

    Args:
      saved: None if the checkpoint has no record of options.
      wanted: of the target.
      item: name of the tree.
    """
    if saved is None:
        return [f"{item}: {path}: no options recorded, {wanted[path]} wanted" for path in wanted]
    return [
        f"{item}: {path}: {saved.get(path, 'no options')} saved, "
        f"{wanted.get(path, 'no options')} wanted"
        for path in sorted({*saved, *wanted})
        if saved.get(path) != wanted.get(path)
    ]


def rank_hint(saved: Mapping[str, LeafRecord], wanted: Mapping[str, Any]) -> str | None:
    """Returns a message if two adapters differ only in their rank.

    They do if one size changes to the same other size in every array whose shape differs, on the
    last axis of some (one factor) and on another axis of the others (its partner). A rank does not
    exceed the other sizes of a factor, which distinguishes it from the width of a layer.
    """
    if set(saved) != set(wanted):
        return None
    changes, on_last_axis = set(), set()
    for path in wanted:
        old, new = saved[path].shape, _stored(wanted[path])[0]
        if old == new:
            continue
        axes = [k for k, sizes in enumerate(zip(old, new, strict=False)) if len({*sizes}) == 2]
        if len(old) != len(new) or len(axes) != 1:
            return None
        (axis,) = axes
        if min(old[axis], new[axis]) > max((*old[:axis], *old[axis + 1 :]), default=0):
            return None
        changes.add((old[axis], new[axis]))
        on_last_axis.add(axis == len(old) - 1)
    if len(changes) != 1 or len(on_last_axis) != 2:
        return None
    ((before, after),) = changes
    return f"rank {before} saved, {after} wanted"


def nesting_hint(saved: Collection[str], wanted: Collection[str]) -> str | None:
    """Returns a message if one optimizer state is an entry of the other, such as of a tuple.

    Args:
      saved, wanted: the paths of the leaves.

    Example:
      >>> nesting_hint({"0/mu": 1, "1": 2}, {"mu": 1})
      "the saved opt_state is a tree whose entry '0' is this one: pass the whole tree"
    """
    for outer, inner, message in (
        (
            saved,
            wanted,
            "the saved opt_state is a tree whose entry {!r} is this one: pass the whole tree",
        ),
        (wanted, saved, "only the entry {!r} of this opt_state was saved: pass that entry alone"),
    ):
        for key in sorted({path.partition("/")[0] for path in outer if "/" in path}):
            start = f"{key}/"
            entry = {path.removeprefix(start) for path in outer if path.startswith(start)}
            if entry == set(inner):
                return message.format(key)
    return None


def _kind(dtype: np.dtype) -> str:
    names = {"complex": jnp.complexfloating, "float": jnp.floating, "integer": jnp.integer}
    return next((name for name, kind in names.items() if jnp.issubdtype(dtype, kind)), "bool")


def _on_host(leaf: Any) -> bool:
    return not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct))


def read_sharding(leaf: Any) -> jax.sharding.Sharding | None:
    """Returns the sharding in which to read the array of a target leaf; None for the host.

    Arrays that are not committed to a device, such as Optax's counters, are read to the host: read
    to one device, they would be incompatible with arrays on a mesh.
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
    """Returns a stored array as the type of the target's leaf, in its dtype and sharding.

    Args:
      x: the array, read in the sharding that `read_sharding` returned.
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
    # Weakly typed scalars stay weakly typed: a float32 learning rate would otherwise promote
    # bfloat16 updates to float32.
    if getattr(leaf, "weak_type", False) and x.shape == ():
        weak, sharding = jnp.asarray(np.asarray(x).item()), read_sharding(leaf)
        if weak.dtype == leaf.dtype:
            return weak if sharding is None else jax.device_put(weak, sharding)
    return jnp.asarray(x).astype(leaf.dtype)


def check_equal_everywhere(
    local: Mapping[str, Collection[str]], described: Mapping[str, Mapping[str, LeafRecord]]
) -> None:
    """Raises ValueError if process-local leaves, saved by process 0, differ between processes.

    Args:
      local: the paths of these leaves, by item.
      described: the records of all leaves, by item and path.
    """
    digests = {
        f"{item}: {path}": described[item][path].digest
        for item, paths in local.items()
        for path in paths
    }
    if paths := _processes.differing(digests):
        raise ValueError(
            listing(
                "The values of these leaves differ between the processes, and only those of "
                "process 0 would be saved. Create them as global arrays, under jax.jit:",
                paths,
            )
        )
