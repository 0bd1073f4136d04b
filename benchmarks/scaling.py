"""Memory and communication of a LoFT training step on TPUs and GPUs, compiled beside predicted.

    python benchmarks/scaling.py --target v5e:2x4 --model 7b --mesh fsdp=4,tensor=2
    python benchmarks/scaling.py            # every row of docs/scaling.md, about an hour
    python benchmarks/scaling.py --table    # prints the tables from the results
    python benchmarks/scaling.py --paper    # LLaMA-3-70B on 256 chips, from the formulas alone

No accelerator is needed: the whole step (`scaling_step.py`) is compiled ahead of time, for TPUs by
libtpu (`pip install libtpu`), for GPUs by jax's CUDA plugin (`pip install jax-cuda12-plugin
jax-cuda12-pjrt nvidia-cuda-nvcc-cu12`). What the compiler plans for one device is printed beside
the formulas of `scaling_model.py`.
"""

import argparse
import importlib.metadata
import json
import os
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before jax starts: the accelerators are only compiled for
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import collectives
import jax
import scaling_model
from scaling_step import AXES, MODELS, Setting, compiled_step

RESULTS = Path(__file__).parent / "results" / "scaling.jsonl"
HBM = {"v5e": 16 * 2**30, "v6e": 32 * 2**30, "v5p": 95 * 2**30, "h200": 141 * 10**9}
"""Memory of one device."""

METHODS = ("calibrated", "factored", "lora")


def rows() -> list[Setting]:
    """The settings of the tables."""
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
    beside = {"fsdp": 4, "tensor": 2}
    settings += [
        Setting(target, "7b", beside, method=method)
        for target in ("v5e:2x4", "h200:8")
        for method in ("factored", "lora")
    ]
    many, wide = {"fsdp": 32, "tensor": 8}, {"fsdp": 64, "tensor": 4}
    for method in METHODS:
        settings.append(Setting("v5e:16x16", "7b", many, method=method, batch=64))
        settings.append(Setting("v5e:16x16", "70b", wide, method=method, batch=256, length=1024))
    return settings


def on_paper() -> list[Setting]:
    """LLaMA-3-70B on 256 chips in several ways."""
    meshes = [
        {"fsdp": 256},
        {"fsdp": 64, "tensor": 4},
        {"fsdp": 32, "tensor": 8},
        {"data": 4, "fsdp": 16, "tensor": 4},
    ]
    seventy = lambda mesh, rank, method: Setting(
        "v5e:16x16", "70b", mesh, rank, method, batch=256, length=1024
    )
    widths = [(rank, method) for rank in (16, 32, 64) for method in METHODS]
    return [seventy(mesh, *widths[0]) for mesh in meshes] + [
        seventy(meshes[1], *width) for width in widths[1:]
    ]


def measure(setting: Setting) -> dict[str, Any]:
    """Compiles a setting and returns its row."""
    began = time.perf_counter()
    compiled = compiled_step(setting)
    seconds = time.perf_counter() - began
    analysis = compiled.memory_analysis()
    return {
        **named(setting),
        "compile_s": round(seconds, 1),
        "arguments": analysis.argument_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "shardings_kept": shardings_kept(compiled),
        **crossing(compiled),
        "versions": versions(setting),
    }


def crossing(compiled: Any) -> dict[str, Any]:
    """What the program sends, the model and the optimizer; nothing where its text cannot be had."""
    try:
        found = collectives.collectives(compiled.as_text())
    except jax.errors.JaxRuntimeError:  # jaxlib 0.10.2 does not read those for v5p and v6e
        return {"sent_by_model": None, "sent_by_optimizer": None, "optimizer_kinds": []}
    of_update = [one for one in found if is_of_update(one)]
    of_model = [one for one in found if not is_of_update(one)]
    largest = max(of_update, key=lambda one: one.bytes, default=None)
    return {
        "sent_by_model": round(collectives.total_sent(of_model)),
        "sent_by_optimizer": round(collectives.total_sent(of_update)),
        "optimizer_kinds": sorted({one.kind for one in of_update}),
        "optimizer_largest": f"{largest.kind} {largest.shapes}" if largest else "",
    }


def is_of_update(one: collectives.Collective) -> bool:
    """Whether a collective is the optimizer's; one that the model's was joined to is not."""
    return "optimizer" in one.source and "jvp(" not in one.source


def named(setting: Setting) -> dict[str, Any]:
    """A setting as JSON, axes of size 1 left out."""
    mesh = {axis: setting.size(axis) for axis in AXES if setting.size(axis) > 1}
    return {
        "target": setting.target,
        "model": setting.model,
        "mesh": mesh,
        "rank": setting.rank,
        "method": setting.method,
        "batch": setting.batch,
        "length": setting.length,
    }


def setting_from(row: dict[str, Any]) -> Setting:
    """The setting of a row of the results."""
    return Setting(**{name: row[name] for name in named(rows()[0])})


def shardings_kept(compiled: Any) -> bool:
    """Whether adapters and state leave the step split as they came: as was asked for."""
    (adapter, state, *_), _ = compiled.input_shardings
    came, leave = jax.tree.leaves((adapter, state)), jax.tree.leaves(compiled.output_shardings[:2])
    avals = jax.tree.leaves(compiled.in_avals[0][:2])
    return all(
        x.is_equivalent_to(y, aval.ndim) for x, y, aval in zip(came, leave, avals, strict=True)
    )


def versions(setting: Setting) -> dict[str, str]:
    compiler = {"h200": "jax-cuda12-pjrt", "cpu": "jaxlib"}
    packages = ["jax", "jaxlib", compiler.get(setting.target.partition(":")[0], "libtpu")]
    return {name: importlib.metadata.version(name) for name in packages}


def results() -> list[dict[str, Any]]:
    """The kept rows of the tables' settings, the latest of each, in the order of the tables."""
    latest: dict[str, dict[str, Any] | None] = {key_of(named(setting)): None for setting in rows()}
    for line in RESULTS.read_text().splitlines():
        row = json.loads(line)
        if key_of(row) in latest:
            latest[key_of(row)] = row
    return [row for row in latest.values() if row]


def key_of(row: dict[str, Any]) -> str:
    """What tells the rows of one setting from those of others."""
    return json.dumps([row[name] for name in named(rows()[0])])


def tables(measured: list[dict[str, Any]]) -> str:
    """The tables of docs/scaling.md: memory, then communication, each compiled / predicted."""
    lines = [
        "| model | devices | mesh | method | arguments | temporaries | total | error | of HBM |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in measured:
        guess = scaling_model.memory(setting_from(row))
        total = row["arguments"] + row["temporaries"]
        hbm = HBM.get(row["target"].partition(":")[0])
        lines.append(
            f"| {head(row)} | {gib(row['arguments'], guess.arguments)} | "
            f"{gib(row['temporaries'], guess.temporaries)} | {gib(total, guess.total)} | "
            f"{guess.total / total - 1:+.1%} | {f'{total / hbm:.0%}' if hbm else ''} |"
        )
    lines += [
        "",
        "| model | devices | mesh | method | model sends | optimizer sends | its collectives |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in measured:
        if row["sent_by_model"] is None:
            continue
        *of_model, loft = scaling_model.traffic(setting_from(row))
        lines.append(
            f"| {head(row)} | {gib(row['sent_by_model'], sum(of_model))} | "
            f"{mib(row['sent_by_optimizer'], loft)} | {', '.join(row['optimizer_kinds'])} |"
        )
    return "\n".join(lines)


def paper(settings: list[Setting]) -> str:
    """The table of what is predicted and not compiled."""
    lines = [
        "| model | devices | mesh | method | rank | base | adapter, state | temporaries | of HBM "
        "| model sends | optimizer sends |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for setting in settings:
        memory = scaling_model.memory(setting)
        *of_model, loft = scaling_model.traffic(setting)
        share = memory.total / HBM[setting.target.partition(":")[0]]
        sizes = (memory.base, memory.adapter + memory.state, memory.temporaries)
        cells = " | ".join(f"{size / 2**30:.2f}" for size in sizes)
        lines.append(
            f"| {head(named(setting))} | {setting.rank} | {cells} | {share:.0%} | "
            f"{sum(of_model) / 2**30:.1f} | {loft / 2**30:.2f} |"
        )
    return "\n".join(lines)


def head(row: dict[str, Any]) -> str:
    mesh = ", ".join(f"{axis} {size}" for axis, size in row["mesh"].items())
    return f"{row['model'].upper()} | {row['target']} | {mesh} | {row['method']}"


def gib(compiled: float, guess: float) -> str:
    return f"{compiled / 2**30:.2f} / {guess / 2**30:.2f}"


def mib(compiled: float, guess: float) -> str:
    return f"{compiled / 2**20:.1f} / {guess / 2**20:.1f}"


def setting_of(options: argparse.Namespace) -> Setting:
    mesh = dict(axis.split("=") for axis in options.mesh.split(","))
    if unknown := set(mesh) - set(AXES):
        raise SystemExit(f"unknown axis {unknown.pop()!r}: choose from {', '.join(AXES)}")
    return Setting(
        options.target,
        options.model,
        {axis: int(size) for axis, size in mesh.items()},
        options.rank,
        options.method,
        options.batch,
        options.length,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", help='"v5e:2x4" or another TPU topology, or "h200:8"')
    parser.add_argument("--model", choices=MODELS, default="7b")
    parser.add_argument("--mesh", default="fsdp=8", help="sizes of data, fsdp and tensor")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--method", choices=("calibrated", "factored", "lora"), default="calibrated"
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--table", action="store_true", help="print the tables from the results")
    parser.add_argument("--paper", action="store_true", help="print what is only predicted")
    options = parser.parse_args()
    if options.paper:
        print(paper(on_paper()))
        return
    if options.table:
        print(tables(results()))
        return
    for setting in [setting_of(options)] if options.target else rows():
        row = measure(setting)
        print(tables([row]), flush=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
