"""Measures what the host holds while a model in several files is loaded.

    python -m benchmarks.cost load-memory --layers 16 --hidden 1024

A LLaMA with random bfloat16 weights is written as one file for every four layers, and loaded by a
process of its own in each dtype. The table shows the weights' size, by how much the process grew,
and how much more it held at its peak, beside the size of the largest tensor of the files.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from benchmarks import markdown
from benchmarks.command_line import add_results
from benchmarks.records import Row, append
from examples.common.models.llama_config import LlamaConfig
from examples.common.models.llama_weights import build_model
from examples.common.models.pretrained import Safetensors

ROOT = Path(__file__).resolve().parents[2]
DTYPES = ("float32", "bfloat16")


def config_of(layers: int, hidden: int) -> LlamaConfig:
    """A LLaMA's shape with that depth and width."""
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        tie_word_embeddings=False,
    )


def files(config: LlamaConfig) -> Iterator[dict[str, np.ndarray]]:
    """The random tensors of each file."""
    draw = np.random.default_rng(0)
    width, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    make = lambda *shape: draw.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
    yield {f"{name}.weight": make(vocabulary, width) for name in ("model.embed_tokens", "lm_head")}
    yield {"model.norm.weight": make(width)}
    for begin in range(0, config.num_hidden_layers, 4):
        tensors = {}
        for layer in range(begin, min(begin + 4, config.num_hidden_layers)):
            prefix = f"model.layers.{layer}"
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}.{name}.weight"] = make(width)
            for part in "qkvo":
                tensors[f"{prefix}.self_attn.{part}_proj.weight"] = make(width, width)
            for part, shape in (("gate", (inner, width)), ("up", (inner, width))):
                tensors[f"{prefix}.mlp.{part}_proj.weight"] = make(*shape)
            tensors[f"{prefix}.mlp.down_proj.weight"] = make(width, inner)
        yield tensors


def resident() -> float:
    """Resident memory of this process, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def load(folder: Path, options: argparse.Namespace) -> Row:
    """Loads the model in this process."""
    jax.block_until_ready(jax.numpy.zeros(1))
    before = resident()
    config = config_of(options.layers, options.hidden)
    model: Any = build_model(config, Safetensors(folder), dtype=options.dtype)
    weights = jax.tree.leaves(nnx.state(model))
    jax.block_until_ready(weights)
    after = resident()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6  # kilobytes on Linux
    return {
        "weights_mb": round(sum(x.nbytes for x in weights) / 1e6),
        "grown_mb": round(after - before),
        "peak_above_mb": round(peak - after),
    }


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    keys = ("dtype", "weights_mb", "grown_mb", "peak_above_mb", "largest_tensor_mb")
    heads = ["dtype", "weights, MB", "process grew by, MB", "peak above, MB", "largest tensor, MB"]
    return markdown.table(heads, ([row[key] for key in keys] for row in rows))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--layers", type=int, default=16)
    add("--hidden", type=int, default=1024)
    add("--folder", type=Path, help="load the files in this folder, in this process")
    add("--dtype", choices=DTYPES, default="float32", help="for --folder")
    add_results(parser)


def run(options: argparse.Namespace) -> None:
    if options.folder:
        print(json.dumps(load(options.folder, options)))
        return
    shape = ["--layers", str(options.layers), "--hidden", str(options.hidden)]
    rows, largest = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for number, tensors in enumerate(files(config_of(options.layers, options.hidden))):
            save_file(tensors, Path(folder) / f"model-{number:05}.safetensors")
            largest = max(largest, *(tensor.nbytes for tensor in tensors.values()))
        for dtype in DTYPES:
            command = [sys.executable, "-m", "benchmarks.cost", "load-memory", *shape]
            command += ["--folder", folder, "--dtype", dtype]
            out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
            found = json.loads(out.stdout)
            rows.append({"dtype": dtype} | found | {"largest_tensor_mb": round(largest / 1e6)})
    append(options.results, rows)
    print(table(rows))
