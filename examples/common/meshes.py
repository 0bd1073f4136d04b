"""A language model on a mesh: the sharding of each weight.

The mesh axis `data` shards the batch; `fsdp` shards the batch and the stored weights; `tensor`
shards the computation of a layer as Megatron does (the first weight of two by its outputs, the
second by its inputs). The compiler partitions the program; the model contains no mesh code.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from loft_jax import LoraPairs
from loft_jax.sharding import adapter_shardings

from .errors import UserError

AXES = ("data", "fsdp", "tensor")

_WEIGHTS = (
    # The first axis stacks the layers. A weight with an adapter is in `base`.
    (r"layers/.*/(q|k|v|gate|up)_proj/(base/)?kernel", P(None, "fsdp", "tensor")),
    (r"layers/.*/(o|down)_proj/(base/)?kernel", P(None, "tensor", "fsdp")),
    (r"layers/.*/(q|k|v|gate|up)_proj/(base/)?bias", P(None, "tensor")),
    (r"h/.*/c_(attn|fc)/(base/)?kernel", P(None, "fsdp", "tensor")),
    (r"h/.*/c_proj/(base/)?kernel", P(None, "tensor", "fsdp")),
    (r"h/.*/c_(attn|fc)/(base/)?bias", P(None, "tensor")),
    (r"(embed_tokens|wte)/embedding", P("tensor", "fsdp")),
    (r"lm_head/kernel", P("fsdp", "tensor")),
)


def parse_mesh(text: str) -> dict[str, int]:
    """Parses 'data=2,fsdp=2,tensor=2'; the size of a missing axis is 1."""
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in AXES or not size.isdigit() or int(size) < 1:
            raise UserError(
                f"--mesh {text}: {part!r} is not one of {', '.join(AXES)} with a size; an example "
                "is data=2,fsdp=2,tensor=2."
            )
        sizes[name] = int(size)
    return sizes


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
    """A mesh of all devices of all processes, with `Auto` axes."""
    count = int(np.prod(list(sizes.values())))
    if count != len(jax.devices()):
        wanted = " x ".join(f"{name}={size}" for name, size in sizes.items())
        raise UserError(
            f"--mesh {wanted} needs {count} devices, but there are {len(jax.devices())} "
            f"({jax.devices()[0].platform}): choose sizes with that product."
        )
    types = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types)


def place_model(model: nnx.Module, mesh: Mesh, pairs: LoraPairs) -> None:
    """Moves a model's parameters to a mesh; adapters follow the sharding of their weights."""
    adapter, weights, rest = nnx.split_state(nnx.state(model), nnx.LoRAParam, nnx.Param, ...)
    of_weights = jax.tree.map_with_path(
        lambda path, leaf: weight_sharding(_name(path), leaf.shape, mesh), weights
    )
    placed = [jax.tree.map(_moved, weights, of_weights), jax.tree.map(_whole(mesh), rest)]
    if jax.tree.leaves(adapter):
        of_factors = adapter_shardings(adapter, of_weights, pairs)
        placed.append(jax.tree.map(put, adapter, of_factors))
    nnx.update(model, *placed)


def weight_sharding(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The sharding of a frozen weight; an axis whose size is not divisible is not sharded.

    Args:
        path: its path in the model, keys joined by `/`.
        shape: its shape.
        mesh: with the axes `AXES`.
    """
    spec = next((spec for regex, spec in _WEIGHTS if re.fullmatch(regex, path)), P())
    fits = [
        name if name and size % mesh.shape[name] == 0 else None
        for name, size in zip(spec, shape, strict=False)
    ]
    return NamedSharding(mesh, P(*fits))


def batch_sharding(mesh: Mesh, rows: int, axis: int = 0) -> NamedSharding:
    """The sharding of a batch with `rows` rows along `axis`: over `data` and `fsdp`."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise UserError(
            f"{rows} examples cannot be split over data x fsdp = {parts} devices: make "
            "--batch-size, divided by --accumulate, a multiple."
        )
    return NamedSharding(mesh, P(*[None] * axis, ("data", "fsdp")))


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh of the arrays in a tree, if any."""
    sharding = jax.tree.leaves(tree)[0].sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


def put(array: Any, sharding: NamedSharding) -> jax.Array:
    """Shards an array, of which each process has a full copy, over all devices."""
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _whole(mesh: Mesh):
    return lambda leaf: leaf if _is_key(leaf) else put(leaf, NamedSharding(mesh, P()))


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def _moved(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    """`put`, unless the array is in its place already."""
    return array if array.sharding == sharding else put(array, sharding)
