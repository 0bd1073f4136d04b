"""Layouts of a tensor-parallel, FSDP or data-parallel model, and what a compiled program moves."""

import math
import re
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from loft_jax.sharding import factor_specs

M, N, R, LAYERS = 512, 384, 4, 8
"""Sizes of the weights here; all of them can be sharded over eight devices."""


class Layout(NamedTuple):
    """A mesh, and the axes over which the inputs and outputs of a column-parallel weight lie."""

    shape: dict[str, int]
    inputs: str | tuple[str, ...] | None
    outputs: str | tuple[str, ...] | None

    def mesh(self, axis_type: AxisType = AxisType.Auto) -> Mesh:
        return jax.make_mesh(
            tuple(self.shape.values()),
            tuple(self.shape),
            axis_types=(axis_type,) * len(self.shape),
            devices=jax.devices()[: math.prod(self.shape.values())],
        )

    def specs(self) -> dict:
        """A column- and a row-parallel adapter, stacked layers, heads, and a non-LoRA parameter."""
        i, o = self.inputs, self.outputs
        pair = lambda specs: dict(zip(("lora_a", "lora_b"), specs, strict=True))
        return {
            "down": pair(factor_specs(P(o, i))),
            "head": P(i),
            "q": pair(factor_specs(P(i, o, None), outputs=2)),
            "stack": {"up": pair(factor_specs(P(None, i, o), batch=(0,)))},
        }


LAYOUTS = {
    "data=8": Layout({"data": 8}, None, None),
    "tensor=8": Layout({"tensor": 8}, None, "tensor"),
    "fsdp=8": Layout({"fsdp": 8}, "fsdp", None),
    "fsdp=4,tensor=2": Layout({"fsdp": 4, "tensor": 2}, "fsdp", "tensor"),
    "data=2,fsdp=2,tensor=2": Layout({"data": 2, "fsdp": 2, "tensor": 2}, "fsdp", "tensor"),
    "(data,fsdp)=4,tensor=2": Layout(
        {"data": 2, "fsdp": 2, "tensor": 2}, ("data", "fsdp"), "tensor"
    ),
}
SHAPES = {
    "down": {"lora_a": (N, R), "lora_b": (R, M)},
    "head": (M, 8),
    "q": {"lora_a": (M, R), "lora_b": (R, 8, N // 8)},
    "stack": {"up": {"lora_a": (LAYERS, M, R), "lora_b": (LAYERS, R, N)}},
}


def parameters(seed: int = 0) -> dict:
    """Normal entries, in float64 where that is on."""
    rng = np.random.default_rng(seed)
    draw = lambda shape: jnp.asarray(rng.normal(size=shape))
    return jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def shardings(layout: Layout, mesh: Mesh) -> dict:
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), layout.specs())


def abstract(tree, shardings):
    """Shapes on a mesh."""
    on_mesh = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(on_mesh, tree, shardings)


def collectives(compiled_text: str) -> Counter:
    """``(operation, shape)`` of every array that a compiled program exchanges, and how often."""
    found: Counter = Counter()
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    for match in re.finditer(rf"= (.*?) ({names})(?:-start)?\(", compiled_text):
        for sizes in re.findall(r"\w+\[([\d,]*)\]", match[1]):
            found[match[2], tuple(int(size) for size in sizes.split(",") if size)] += 1
    return found


def largest_array(compiled_text: str) -> int:
    """Entries of the largest array that a device holds."""
    shapes = re.findall(r"= \w+\[([\d,]+)\]", compiled_text)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)
