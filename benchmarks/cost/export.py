"""Compares the time and memory of `save_peft` with those of PEFT's save_pretrained.

    python -m benchmarks.cost export

The adapter has the shape of LLaMA-7B's attention and one projection of the MLP: 160 pairs of rank
16, 98 MB in float32. Each library saves it in processes of its own, in alternation: once, as a
program that ends after its training, and then again to new folders. The memory is the growth of the
resident set during a save. PEFT's model is on the CPU, without the base weights.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import markdown
from benchmarks.command_line import add_runs

LAYERS, WIDTH, HIDDEN, RANK = 32, 4096, 11008, 16
SIZES = {
    **{f"self_attn.{part}_proj": (WIDTH, WIDTH) for part in "qkvo"},
    "mlp.up_proj": (WIDTH, HIDDEN),
}
LIBRARIES = ("loft_jax", "peft")
SAVES = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add_runs(parser, 5)
    parser.add_argument("--library", choices=LIBRARIES, help="save with this one, print JSON")


def run(options: argparse.Namespace) -> None:
    """Measures one library, or prints a table of both."""
    if options.library is not None:
        save = {"loft_jax": ours, "peft": theirs}[options.library]()
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps([measure(save, f"{folder}/{k}") for k in range(SAVES)]))
        return
    found: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in LIBRARIES}
    for _ in range(options.runs):
        for name in LIBRARIES:
            command = [sys.executable, "-m", "benchmarks.cost", "export", "--library", name]
            environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, check=True, capture_output=True, env=environment)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    rows = [[name, *map(cell, columns(found[name]))] for name in LIBRARIES]
    print(markdown.table(["", "first save, ms", "later saves, ms", "memory, MB"], rows))


def columns(runs: list[list[tuple[float, float]]]) -> tuple[list[float], list[float], list[float]]:
    """The milliseconds of first and later saves, and the largest growth of memory of each run."""
    first = [1e3 * saves[0][0] for saves in runs]
    later = [1e3 * seconds for saves in runs for seconds, _ in saves[1:]]
    return first, later, [max(memory for _, memory in saves) / 1e6 for saves in runs]


def cell(values: list[float]) -> str:
    """The median and the range."""
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


def ours() -> Callable[[str], Any]:
    """A save of loft_jax, with stacked layers as in training."""
    import jax
    import jax.numpy as jnp

    from loft_jax import LoraPairs
    from loft_jax.adapters import save_peft

    draw, tree = np.random.default_rng(0), {}
    random = lambda *shape: jnp.asarray(draw.normal(size=shape).astype(np.float32))
    for name, (fan_in, fan_out) in SIZES.items():
        block, module = name.split(".")
        a, b = random(LAYERS, fan_in, RANK), random(LAYERS, RANK, fan_out)
        tree.setdefault(block, {})[module] = {"lora_a": a, "lora_b": b}
    jax.block_until_ready(tree)
    options = {"family": "llama", "pairs": LoraPairs(scale=2.0), "task_type": "CAUSAL_LM"}
    return lambda path: save_peft(path, {"layers": tree}, **options)


def theirs() -> Callable[[str], Any]:
    """A save of PEFT."""
    import peft
    import torch
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS
    )
    targets = [name.split(".")[1] for name in SIZES]
    lora = peft.LoraConfig(r=RANK, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
    with torch.device("meta"):
        model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)
    for name, module in model.named_modules():
        if "lora_" in name and hasattr(module, "weight"):
            module.weight = torch.nn.Parameter(torch.randn(module.weight.shape))
    return lambda path: model.save_pretrained(path)


def measure(save: Callable[[str], Any], path: str) -> tuple[float, float]:
    """The seconds of a save, and by how many bytes the resident set grew at most."""
    stop, before, largest = threading.Event(), resident(), 0

    def watch() -> None:
        nonlocal largest
        while not stop.wait(0.001):
            largest = max(largest, resident() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    started = time.perf_counter()
    save(path)
    seconds = time.perf_counter() - started
    stop.set()
    thread.join()
    return seconds, largest


def resident() -> int:
    """The bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
