"""Compiles training steps for TPUs and GPUs, and compares memory and traffic with the formulas.

    python -m benchmarks.scaling compile --target v5e:2x4 --model 7b --mesh fsdp=4,tensor=2
    python -m benchmarks.scaling compile        # all rows of docs/scaling.md, about an hour

No accelerator is needed. The whole step (`step.py`) is compiled ahead of time, for TPUs by libtpu
(`pip install libtpu`), for GPUs by jax's CUDA plugin (`pip install jax-cuda12-plugin
jax-cuda12-pjrt nvidia-cuda-nvcc-cu12`). The tables show the compiler's plan for one device and the
prediction of the formulas (`formulas.py`).
"""

import argparse
import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks.records import Row
from benchmarks.scaling.collectives import Collective, collectives, total_sent
from benchmarks.scaling.settings import compiled, in_chunks, to_row
from benchmarks.scaling.step import (
    AXES,
    METHODS,
    MODELS,
    Setting,
    compiled_step,
    without_accelerators,
)
from benchmarks.scaling.tables import RESULTS, tables
from examples.common.errors import UserError


def measure(setting: Setting) -> Row:
    """Compiles a setting and returns its row."""
    began = time.perf_counter()
    step = compiled_step(setting)
    seconds = time.perf_counter() - began
    analysis = step.memory_analysis()
    return {
        **to_row(setting),
        "compile_s": round(seconds, 1),
        "arguments": analysis.argument_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "shardings_kept": shardings_kept(step),
        **traffic(step),
        "versions": versions(setting),
    }


def traffic(step: Any) -> Row:
    """The bytes that model and optimizer send; None if the program has no text."""
    try:
        found = collectives(step.as_text())
    except jax.errors.JaxRuntimeError:  # jaxlib 0.10.2 cannot read programs for v5p and v6e
        return {"sent_by_model": None, "sent_by_optimizer": None, "optimizer_kinds": []}
    of_update = [one for one in found if is_of_update(one)]
    of_model = [one for one in found if not is_of_update(one)]
    largest = max(of_update, key=lambda one: one.bytes, default=None)
    return {
        "sent_by_model": round(total_sent(of_model)),
        "sent_by_optimizer": round(total_sent(of_update)),
        "optimizer_kinds": sorted({one.kind for one in of_update}),
        "optimizer_largest": f"{largest.kind} {largest.shapes}" if largest else "",
    }


def is_of_update(one: Collective) -> bool:
    """Whether a collective belongs to the optimizer alone."""
    return "optimizer" in one.source and "jvp(" not in one.source


def shardings_kept(step: Any) -> bool:
    """Whether adapters and state have the same shardings before and after the step."""
    (adapter, state, *_), _ = step.input_shardings
    before, after = jax.tree.leaves((adapter, state)), jax.tree.leaves(step.output_shardings[:2])
    avals = jax.tree.leaves(step.in_avals[0][:2])
    return all(
        x.is_equivalent_to(y, aval.ndim) for x, y, aval in zip(before, after, avals, strict=True)
    )


def versions(setting: Setting) -> dict[str, str]:
    """The versions of jax and of the compiler."""
    compiler = {"h200": "jax-cuda12-pjrt", "cpu": "jaxlib"}
    packages = ["jax", "jaxlib", compiler.get(setting.target.partition(":")[0], "libtpu")]
    return {name: importlib.metadata.version(name) for name in packages}


def setting_of(options: argparse.Namespace) -> Setting:
    """The setting that the options describe."""
    mesh = dict(axis.split("=") for axis in options.mesh.split(","))
    if unknown := set(mesh) - set(AXES):
        raise UserError(f"--mesh: unknown axis {unknown.pop()!r}; choose from {', '.join(AXES)}.")
    return Setting(
        options.target,
        options.model,
        {axis: int(size) for axis, size in mesh.items()},
        options.rank,
        options.method,
        options.batch,
        options.length,
        whole_logits=not options.chunks,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--target", help='a TPU topology such as "v5e:2x4", or "h200:8"; default: all rows')
    add("--model", choices=MODELS, default="7b")
    add("--mesh", default="fsdp=8", help="sizes of data, fsdp and tensor (default fsdp=8)")
    add("--rank", type=int, default=16)
    add("--method", choices=METHODS, default="calibrated")
    add("--batch", type=int, default=16, help="sequences per step (default 16)")
    add("--length", type=int, default=256, help="tokens of a sequence (default 256)")
    add("--chunks", action="store_true", help="the loss in chunks of tokens, as in the examples")
    add("--results", type=Path, default=RESULTS, help="append the rows to this JSON-lines file")


def run(options: argparse.Namespace) -> None:
    without_accelerators()
    every = [*compiled(), *in_chunks()]
    for setting in [setting_of(options)] if options.target else every:
        row = measure(setting)
        print(tables([row]), flush=True)
        with options.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
