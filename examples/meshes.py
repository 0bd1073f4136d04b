"""A language model on a mesh: which axis of which weight is split over which devices.

`data` splits the batch alone; `fsdp` splits the batch and, where they rest, the weights; `tensor`
splits what a layer computes (Megatron's way: the first weight of a pair by its outputs, the second
by its inputs). The compiler makes the program of it: the model's code knows nothing of meshes.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from errors import UserError
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from loft_jax import LoraPairs
from loft_jax.sharding import adapter_shardings

AXES = ("data", "fsdp", "tensor")

_WEIGHTS = (
    # Stacked layers first; the weights with an adapter beside them are in `base`.
    (r"layers/.*/(q|k|v|gate|up)_proj/(base/)?kernel", P(None, "fsdp", "tensor")),
    (r"layers/.*/(o|down)_proj/(base/)?kernel", P(None, "tensor", "fsdp")),
    (r"layers/.*/(q|k|v)_proj/(base/)?bias", P(None, "tensor")),
    (r"embed_tokens/embedding", P("tensor", "fsdp")),
    (r"lm_head/kernel", P("fsdp", "tensor")),
)


def parse_mesh(text: str) -> dict[str, int]:
    """'data=2,fsdp=2,tensor=2' to the size of each axis; an axis left out has size 1."""
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in AXES or not size.isdigit() or int(size) < 1:
            raise UserError(
                f"--mesh {text}: {part!r} is not one of {', '.join(AXES)} with a size, such as "
                "data=2,fsdp=2,tensor=2."
            )
        sizes[name] = int(size)
    return sizes


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
    """A mesh of all devices of all processes, its axes the compiler's to use."""
    count = int(np.prod(list(sizes.values())))
    if count != len(jax.devices()):
        wanted = " x ".join(f"{name}={size}" for name, size in sizes.items())
        raise UserError(
            f"--mesh {wanted} is for {count} devices, and there are {len(jax.devices())} "
            f"({jax.devices()[0].platform}): name sizes whose product is that."
        )
    types = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types)


def place_model(model: nnx.Module, mesh: Mesh, pairs: LoraPairs) -> None:
    """Puts a model's parameters on a mesh, adapters where the weights are that they adapt."""
    adapter, others, rest = nnx.split_state(nnx.state(model), nnx.LoRAParam, nnx.Param, ...)
    of_weights = jax.tree.map_with_path(
        lambda path, leaf: _sharding(_name(path), leaf.shape, mesh), others
    )
    placed = [jax.tree.map(put, others, of_weights), jax.tree.map(_whole(mesh), rest)]
    if jax.tree.leaves(adapter):
        of_factors = adapter_shardings(adapter, of_weights, pairs)
        placed.append(jax.tree.map(put, adapter, of_factors))
    nnx.update(model, *placed)


def batch_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Where a batch of so many rows lies: split over `data` and `fsdp`."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise UserError(
            f"--batch-size {rows} cannot be split over data x fsdp = {parts} devices: name a "
            "multiple."
        )
    return NamedSharding(mesh, P(("data", "fsdp")))


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that the arrays of a tree lie on, if any."""
    sharding = jax.tree.leaves(tree)[0].sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


def put(array: Any, sharding: NamedSharding) -> jax.Array:
    """An array that each process has whole, as one array over the devices of all processes."""
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _whole(mesh: Mesh):
    return lambda leaf: leaf if _is_key(leaf) else put(leaf, NamedSharding(mesh, P()))


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def _sharding(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """By the table above; an axis that cannot be divided is left whole, as small models need."""
    spec = next((spec for regex, spec in _WEIGHTS if re.fullmatch(regex, path)), P())
    fits = [
        name if name and size % mesh.shape[name] == 0 else None
        for name, size in zip(spec, shape, strict=False)
    ]
    return NamedSharding(mesh, P(*fits))
