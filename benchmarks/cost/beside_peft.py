"""Times the training step of the example's model beside Hugging Face PEFT's, and their memory.

    pip install torch transformers peft
    python -m benchmarks.cost beside-peft --batch 4x512 --runs 5

Both sides train adapters of rank 8 on q, k, v, up and down of a model with SmolLM2-135M's shapes
and random weights, on random tokens, with AdamW. Each side is a process of its own, so that its
peak resident memory is its own too, and the processes take their steps in alternation. Ours is the
step of `finetune_llm.py` with `--method` and `--dtype`; PEFT's is in float32. With `--recompute`
ours recomputes layers and PEFT checkpoints gradients.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks import markdown
from benchmarks.command_line import add_runs
from benchmarks.cost.timing import in_alternation, paired_ratio, quartiles
from benchmarks.cost.training_step import TARGETS, batch_shape
from benchmarks.records import Row, append
from examples.common.data.text import next_token_loss
from examples.common.methods import METHODS, make_optimizer
from examples.common.models.llama import Llama, LlamaConfig, lora_rule
from examples.common.training import Trainer
from loft_jax.adapters import add_lora, lora_pairs

ROOT = Path(__file__).resolve().parents[2]
SIDES = ("ours", "peft")


def our_step(options: argparse.Namespace) -> Callable[[], Any]:
    """The compiled step of the example's model."""
    rule = lora_rule(TARGETS, options.rank, options.rank)

    @nnx.jit
    def make() -> Llama:
        model = Llama(LlamaConfig(), rngs=nnx.Rngs(0), remat=options.recompute)
        weights = nnx.state(model)
        nnx.update(model, jax.tree.map(lambda x: x.astype(options.dtype), weights))
        return add_lora(model, rule, rngs=nnx.Rngs(1))

    model, pairs = make(), lora_pairs(rule)
    trainer = Trainer(
        model, next_token_loss, lambda rate: make_optimizer(options.method, rate, pairs=pairs)
    )
    state = trainer.start(model)
    rows, length = options.batch
    tokens = np.random.default_rng(0).integers(0, 49152, (rows, length + 1), dtype=np.int32)

    def step() -> None:
        nonlocal state
        state, loss = trainer.step(state, tokens, 1e-4)
        loss.block_until_ready()

    return step


def peft_step(options: argparse.Namespace) -> Callable[[], Any]:
    """The step of PEFT's LoRA on the model of transformers."""
    import peft
    import torch
    import transformers

    ours = LlamaConfig()
    torch.set_num_threads(os.cpu_count() or 1)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    names += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    config = transformers.LlamaConfig(
        **{name: getattr(ours, name) for name in names}, tie_word_embeddings=True, use_cache=False
    )
    model: Any = transformers.LlamaForCausalLM(config)
    if options.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    modules = [f"{name}_proj" for name in TARGETS]
    adapters = peft.LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=modules)
    model = peft.get_peft_model(model, adapters).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    tokens = torch.randint(0, 49152, options.batch)

    def step() -> None:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class Process:
    """One side in a process of its own: a call takes a step, `close` returns its peak memory."""

    def __init__(self, side: str, options: argparse.Namespace):
        batch = "x".join(map(str, options.batch))
        flags = ["--batch", batch, "--rank", str(options.rank), "--method", options.method]
        flags += ["--dtype", options.dtype]
        flags += ["--recompute"] if options.recompute else []
        command = [sys.executable, "-m", "benchmarks.cost", "beside-peft", "--side", side, *flags]
        self._process = subprocess.Popen(
            command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __call__(self) -> None:
        self._ask("step")

    def close(self) -> float:
        """Ends the process; returns its peak resident memory in MB."""
        answer = self._ask("end")
        self._process.wait()
        return float(answer)

    def _ask(self, request: str) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(request, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the process of one side has ended; see its error above")
        return answer


def serve(options: argparse.Namespace) -> None:
    """Takes a step for each line of the standard input that says so, and prints its seconds."""
    step = {"ours": our_step, "peft": peft_step}[options.side](options)
    for request in sys.stdin:
        if request.strip() == "end":
            break
        began = time.perf_counter()
        step()
        print(time.perf_counter() - began, flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
    print(peak / 1e6, flush=True)


def measure(options: argparse.Namespace) -> list[Row]:
    """Measures both sides, a row for each."""
    sides = {side: Process(side, options) for side in SIDES}
    times = in_alternation(sides, options.runs)
    peaks = {side: process.close() for side, process in sides.items()}
    return [
        {
            "side": side,
            "method": options.method if side == "ours" else "lora",
            "batch": "x".join(map(str, options.batch)),
            "rank": options.rank,
            "dtype": options.dtype if side == "ours" else "float32",
            "recompute": options.recompute,
            "step_ms": quartiles(times[side]),
            "ratio": paired_ratio(times[side], times["peft"]),
            "peak_mb": round(peaks[side]),
            "peak_ratio": round(peaks[side] / peaks["peft"], 3),
            "runs": options.runs,
        }
        for side in SIDES
    ]


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""

    def cells(row: Row) -> list[object]:
        low, median, high = row["step_ms"]
        times = f"{median / 1e3:.2f} ({low / 1e3:.2f} to {high / 1e3:.2f})"
        ratio = "{1:.2f} ({0:.2f} to {2:.2f})".format(*row["ratio"])
        recompute = "yes" if row["recompute"] else "no"
        peak = f"{row['peak_mb'] / 1e3:.2f}"
        names = [row["side"], row["method"], row["dtype"], recompute]
        return [*names, times, ratio, peak, row["peak_ratio"]]

    heads = [
        "side",
        "method",
        "dtype",
        "recomputed",
        "step, s (quartiles)",
        "ratio",
        "peak, GB",
        "ratio",
    ]
    return markdown.table(heads, map(cells, rows))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--batch", type=batch_shape, default=(4, 512), metavar="ROWSxTOKENS")
    add("--rank", type=int, default=8)
    add("--method", choices=METHODS, default="loft")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of our weights")
    add("--recompute", action="store_true", help="recompute each layer in the backward pass")
    add("--side", choices=SIDES, help="take the steps of one side, on request from stdin")
    add_runs(parser, 5)


def run(options: argparse.Namespace) -> None:
    if options.side:
        serve(options)
        return
    rows = measure(options)
    append(options.results, rows)
    print(table(rows))
