"""The settings of the tables in docs/scaling.md, and settings as JSON."""

import functools
import json

from benchmarks.records import Row
from benchmarks.scaling.step import AXES, METHODS, Setting

HBM = {"v5e": 16 * 2**30, "v6e": 32 * 2**30, "v5p": 95 * 2**30, "h200": 141 * 10**9}
"""Memory of one device, in bytes."""


def compiled() -> list[Setting]:
    """The settings that the benchmark compiles."""
    small = [
        ("v5e:2x4", {"fsdp": 8}),
        ("v5e:2x4", {"fsdp": 4, "tensor": 2}),
        ("v5e:2x4", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("v5e:2x4", {"tensor": 8}),
        ("v5p:2x2x1", {"fsdp": 4}),
        ("v6e:2x4", {"data": 2, "fsdp": 4}),
        ("h200:8", {"data": 8}),
        ("h200:8", {"fsdp": 8}),
        ("h200:8", {"fsdp": 4, "tensor": 2}),
    ]
    settings = [Setting(target, "7b", mesh) for target, mesh in small]
    settings += [
        Setting(target, "7b", {"fsdp": 4, "tensor": 2}, method=method)
        for target in ("v5e:2x4", "h200:8")
        for method in ("factored", "lora")
    ]
    many, wide = {"fsdp": 32, "tensor": 8}, {"fsdp": 64, "tensor": 4}
    for method in METHODS:
        settings.append(Setting("v5e:16x16", "7b", many, method=method, batch=64))
        settings.append(Setting("v5e:16x16", "70b", wide, method=method, batch=256, length=1024))
    return settings


def in_chunks() -> list[Setting]:
    """7B on one GPU and on eight, with the loss in chunks of tokens."""
    make = functools.partial(Setting, model="7b", whole_logits=False)
    one = [make("h200:1", mesh={}, method=method) for method in METHODS]
    meshes = ({"data": 8}, {"fsdp": 8}, {"fsdp": 4, "tensor": 2})
    return one + [make("h200:8", mesh=mesh, method="factored") for mesh in meshes]


def predicted() -> list[Setting]:
    """LLaMA-3-70B on 256 chips: several meshes, then several ranks and methods on one mesh."""
    meshes = [
        {"fsdp": 256},
        {"fsdp": 64, "tensor": 4},
        {"fsdp": 32, "tensor": 8},
        {"data": 4, "fsdp": 16, "tensor": 4},
    ]
    on = lambda mesh, rank, method: Setting(
        "v5e:16x16", "70b", mesh, rank, method, batch=256, length=1024
    )
    variants = [(rank, method) for rank in (16, 32, 64) for method in METHODS]
    return [on(mesh, *variants[0]) for mesh in meshes] + [
        on(meshes[1], *variant) for variant in variants[1:]
    ]


FIELDS = ("target", "model", "mesh", "rank", "method", "batch", "length")
"""The fields of a setting that a row of the results has."""


def to_row(setting: Setting) -> Row:
    """A setting as JSON, without axes of size 1."""
    mesh = {axis: setting.size(axis) for axis in AXES if setting.size(axis) > 1}
    chunked = {} if setting.whole_logits else {"whole_logits": False}
    return {name: getattr(setting, name) for name in FIELDS} | {"mesh": mesh} | chunked


def from_row(row: Row) -> Setting:
    """The setting of a row of the results."""
    given = {name: row[name] for name in FIELDS}
    return Setting(**given, whole_logits=row.get("whole_logits", True))


def key_of(row: Row) -> str:
    """The same for all rows of one setting, different for different settings."""
    return json.dumps([*(row[name] for name in FIELDS), row.get("whole_logits", True)])


def describe(row: Row) -> list[str]:
    """The cells that name a setting: model, devices, mesh, method."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in row["mesh"].items())
    return [row["model"].upper(), row["target"], mesh, row["method"]]


def share_of_hbm(target: str, size: float) -> str | None:
    """A size in percent of the memory of a device; None for a CPU."""
    hbm = HBM.get(target.partition(":")[0])
    return f"{size / hbm:.0%}" if hbm else None
