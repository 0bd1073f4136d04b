"""A whole training step of SmolLM2-135M with every optimizer, and its ratio to LoRA's.

    python benchmarks/training_step.py --batches 4x128 --ranks 4 16

Forward, backward and update on the real model with adapters on Q, K, V, Up and Down, random tokens.
All optimizers share the frozen weights and one process and run in alternation, two steps at a time,
since LoFT moves one factor and then the other. "LoRA" is `optax.adamw` on the same adapters. The
ratio is taken within each round and its median printed with the quartiles: the optimizer's part
does not grow with the tokens of a step, so the ratio falls with them (`--batches 1x64 8x256`).
"""

import argparse
import functools
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from timing import append, in_alternation, paired_ratio, quartiles

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.common.data.text import next_token_loss
from examples.common.models import llama_weights as weights
from examples.common.models.llama import lora_rule
from examples.common.training import Trainer
from loft_jax import LoraPairs, baselines, loft_adamw, loft_muon
from loft_jax.adapters import add_lora, lora_pairs

TARGETS = ("q", "k", "v", "up", "down")
Make = Callable[[LoraPairs, Any], optax.GradientTransformation]
METHODS: dict[str, Make] = {
    "LoRA": lambda pairs, rate: optax.adamw(rate),
    # The control: what its ratio is off from 1, no other ratio can be trusted to.
    "LoRA again": lambda pairs, rate: optax.adamw(rate),
    "calibrated": lambda pairs, rate: loft_adamw(rate, pairs=pairs),
    "factored": lambda pairs, rate: loft_adamw(rate, pairs=pairs, second_moment="factored"),
    "simple": lambda pairs, rate: loft_adamw(rate, pairs=pairs, second_moment="diagonal"),
    "loft_muon": lambda pairs, rate: loft_muon(rate, pairs=pairs),
    "optax.contrib.muon": lambda pairs, rate: optax.contrib.muon(
        rate, muon_weight_dimension_numbers=_last_two
    ),
    "LoRA+": lambda pairs, rate: baselines.lora_plus(rate, pairs=pairs),
    "scaled AdamW": lambda pairs, rate: baselines.scaled_adamw(rate, pairs=pairs),
    "AltLoRA+": lambda pairs, rate: baselines.altlora_plus(rate, pairs=pairs),
    "LoRA-Pro": lambda pairs, rate: baselines.lora_pro(rate, pairs=pairs),
}


def _last_two(params: Any) -> Any:
    """Layers are stacked on the first axis: a matrix is what follows."""
    return jax.tree.map(
        lambda x: optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), params
    )


class Step:
    """Two compiled training steps of one method."""

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
            raise FloatingPointError("the loss is not finite: this run measures nothing")


def make_steps(
    pretrained: weights.Pretrained, rank: int, shape: tuple[int, int], chosen: list[str]
) -> dict[str, Step]:
    """The chosen methods' steps on one model, with adapters of a rank and random tokens."""
    rule = lora_rule(TARGETS, rank, rank)
    model = add_lora(pretrained.build(), rule, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(
        0, pretrained.config.vocab_size, (shape[0], shape[1] + 1), dtype=np.int32
    )

    def step(name: str) -> Step:
        make = functools.partial(METHODS[name], lora_pairs(rule))
        return Step(Trainer(model, next_token_loss, make), model, tokens)

    return {name: step(name) for name in chosen}


def measure(
    pretrained: weights.Pretrained, rank: int, shape: tuple[int, int], chosen: list[str], runs: int
) -> list[dict[str, Any]]:
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


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| rank | batch | method | step, ms (quartiles) | to LoRA (quartiles) | state, MB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, median, high = row["step_ms"]
        ratio = "{1:.3f} ({0:.3f} to {2:.3f})".format(*row["ratio"])
        lines.append(
            f"| {row['rank']} | {row['batch']} | {row['method']} | "
            f"{median:.0f} ({low:.0f} to {high:.0f}) | {ratio} | {row['state_mb']} |"
        )
    return "\n".join(lines)


def batch_shape(text: str) -> tuple[int, int]:
    rows, _, length = text.partition("x")
    return int(rows), int(length)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="a folder with config.json, safetensors and tokenizer")
    parser.add_argument("--ranks", nargs="+", type=int, default=[4])
    parser.add_argument("--batches", nargs="+", type=batch_shape, default=[(4, 128)])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--results", type=Path, help="append the rows to this JSON-lines file")
    options = parser.parse_args()
    rows = []
    for rank in options.ranks:
        for shape in options.batches:
            pretrained = weights.load(options.model)
            found = measure(pretrained, rank, shape, options.methods, options.runs)
            append(options.results, found)
            rows += found
    print(table(rows))


if __name__ == "__main__":
    main()
