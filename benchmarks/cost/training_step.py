"""Times a whole training step of SmolLM2-135M with each optimizer, relative to LoRA's.

    python -m benchmarks.cost training-step --batches 4x128 --ranks 4 16

A step is forward, backward and update of the real model on random tokens, with adapters on Q, K, V,
Up and Down. All optimizers share the frozen weights and one process and run in alternation, two
steps per round, because LoFT updates one factor and then the other. "LoRA" is `optax.adamw` on the
same adapters. The ratio is taken within each round; the table shows its median and quartiles. The
optimizer's time does not grow with the tokens of a step, so the ratio falls as they grow
(`--batches 1x64 8x256`).
"""

import argparse
import gc

import jax
import numpy as np
from flax import nnx

from benchmarks import markdown
from benchmarks.command_line import add_runs
from benchmarks.cost.optimizers import LOFT, Make, adamw, muon
from benchmarks.cost.timing import in_alternation, paired_ratio, quartiles
from benchmarks.records import Row, append
from examples.common.data.text import next_token_loss
from examples.common.models import llama_weights
from examples.common.models.llama import lora_rule
from examples.common.training import Trainer
from loft_jax import baselines
from loft_jax.adapters import add_lora, lora_pairs

TARGETS = ("q", "k", "v", "up", "down")
METHODS: dict[str, Make] = {
    "LoRA": adamw,
    # The control: its deviation from 1 bounds the accuracy of all other ratios.
    "LoRA again": adamw,
    **LOFT,
    "optax.contrib.muon": muon,
    "LoRA+": lambda rate, pairs: baselines.lora_plus(rate, pairs=pairs),
    "scaled AdamW": lambda rate, pairs: baselines.scaled_adamw(rate, pairs=pairs),
    "AltLoRA+": lambda rate, pairs: baselines.altlora_plus(rate, pairs=pairs),
    "LoRA-Pro": lambda rate, pairs: baselines.lora_pro(rate, pairs=pairs),
}


class Step:
    """The compiled training step of one method; a call takes two steps."""

    def __init__(self, trainer: Trainer, model: nnx.Module, batch: np.ndarray):
        self.trainer, self.batch = trainer, batch
        self.state = trainer.start(model)
        state = jax.tree.leaves(self.state.opt_state)
        self.state_mb = round(sum(x.nbytes for x in state) / 1e6, 3)

    def __call__(self) -> None:
        for _ in range(2):
            self.state, loss = self.trainer.step(self.state, self.batch, 1e-4)
        jax.block_until_ready((self.state, loss))
        if not np.isfinite(loss):
            raise FloatingPointError("the loss is not finite: the measured time is meaningless")


def make_steps(
    pretrained: llama_weights.Pretrained, rank: int, shape: tuple[int, int], chosen: list[str]
) -> dict[str, Step]:
    """The steps of the chosen methods on one model, with adapters of a rank and random tokens."""
    rule = lora_rule(TARGETS, rank, rank)
    model = add_lora(pretrained.build(), rule, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(
        0, pretrained.config.vocab_size, (shape[0], shape[1] + 1), dtype=np.int32
    )

    pairs = lora_pairs(rule)

    def step(name: str) -> Step:
        trainer = Trainer(model, next_token_loss, lambda rate: METHODS[name](rate, pairs))
        return Step(trainer, model, tokens)

    return {name: step(name) for name in chosen}


def measure(
    pretrained: llama_weights.Pretrained,
    rank: int,
    shape: tuple[int, int],
    chosen: list[str],
    runs: int,
) -> list[Row]:
    """Measures the chosen methods, a row for each; ratios are to the first."""
    steps = make_steps(pretrained, rank, shape, chosen)
    times = in_alternation(steps, runs)
    rows = [
        {
            "rank": rank,
            "batch": "x".join(map(str, shape)),
            "method": name,
            "step_ms": quartiles(times[name] / 2),
            "ratio": paired_ratio(times[name], times[chosen[0]]),
            "state_mb": step.state_mb,
            "runs": runs,
        }
        for name, step in steps.items()
    ]
    steps.clear()
    gc.collect()
    return rows


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""

    def cells(row: Row) -> list[object]:
        low, median, high = row["step_ms"]
        ratio = "{1:.3f} ({0:.3f} to {2:.3f})".format(*row["ratio"])
        times = f"{median:.0f} ({low:.0f} to {high:.0f})"
        return [row["rank"], row["batch"], row["method"], times, ratio, row["state_mb"]]

    heads = ["rank", "batch", "method", "step, ms (quartiles)", "ratio to LoRA (quartiles)"]
    return markdown.table([*heads, "state, MB"], map(cells, rows))


def batch_shape(text: str) -> tuple[int, int]:
    """Sequences and tokens of a batch such as "4x128"."""
    rows, length = map(int, text.split("x"))
    return rows, length


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds --model."""
    text = "folder with config.json, safetensors and tokenizer (default SmolLM2-135M)"
    parser.add_argument("--model", help=text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add = parser.add_argument
    add("--ranks", nargs="+", type=int, default=[4])
    add("--batches", nargs="+", type=batch_shape, default=[(4, 128)], metavar="ROWSxTOKENS")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add_runs(parser, 7)


def run(options: argparse.Namespace) -> None:
    rows = []
    for rank in options.ranks:
        for shape in options.batches:
            pretrained = llama_weights.load(options.model)
            found = measure(pretrained, rank, shape, options.methods, options.runs)
            append(options.results, found)
            rows += found
    print(table(rows))
