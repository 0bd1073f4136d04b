"""Fine-tunes SmolLM2-135M with weights and forward pass in bfloat16, beside float32.

    python -m benchmarks.cost bfloat16-training --data FOLDER --results FILE

FOLDER holds wikitext2-train.txt and wikitext2-valid.txt (or .txt.gz). The query and value
projections have adapters, whose factors are float32 in every run; "balance=False" is LoFT without
balanced factors. The learning rate is 1e-3, three times full fine-tuning's, and gradients are
clipped by their projected norm, as in the examples. A run takes 60 steps. Its loss is that of 8
held-out windows of 64 tokens, in the dtype in which it was trained. All runs of a size, a rank and
a dtype are trained at once, with the same batches. They append their rows to FILE as soon as they
are done, and are not repeated if FILE has them.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks import markdown
from benchmarks.command_line import add_results
from benchmarks.records import Row, append, read
from examples.common.batches import batch_at, spread
from examples.common.data import text
from examples.common.errors import UserError
from examples.common.models import llama, llama_weights
from examples.common.schedules import learning_rate_at
from loft_jax import loft_adamw
from loft_jax.adapters import LoraRule, add_lora
from loft_jax.algorithm.second_moment import SecondMomentName

STEPS, PEAK, MAX_NORM = 60, 1e-3, 1.0
TARGETS = ("q", "v")
SEEDS = (0, 1, 2)
SIZES = ((4, 128), (1, 16), (2, 16))
"""Sequences of a step, and tokens of each."""
UNBALANCED = ((1, 16), (2, 16))
"""The sizes at which balance=False is measured too."""
HELD_OUT, HELD_OUT_LENGTH, HELD_OUT_BATCH = 8, 64, 2

ARMS: tuple[tuple[SecondMomentName, bool], ...] = (
    ("calibrated", True),
    ("calibrated", False),
    ("factored", True),
    ("factored", False),
)
"""The second moment, and whether factors are balanced."""


class Cell(NamedTuple):
    """Runs that are trained at once."""

    sequences: int
    length: int
    rank: int
    dtype: str

    def arms(self) -> list[tuple[SecondMomentName, bool]]:
        """The optimizers. Without balance only in bfloat16, with few tokens."""
        few = self.dtype == "bfloat16" and (self.sequences, self.length) in UNBALANCED
        return [arm for arm in ARMS if arm[1] or few]


class Data(NamedTuple):
    """Tokenized text: the training windows of each length, and the held-out windows."""

    train: dict[int, np.ndarray]
    held_out: np.ndarray


def in_dtype(model: Any, dtype: str) -> Any:
    """The model with all its parameters in `dtype`, and so its forward pass."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(dtype), state))


def train(base: Any, data: Data, rule: LoraRule, cell: Cell, steps: int = STEPS) -> list[Row]:
    """Trains with each optimizer and seed; a row for each run."""
    adapted = [nnx.split(add_lora(base, rule, rngs=nnx.Rngs(s)), nnx.LoRAParam, ...) for s in SEEDS]
    graphdef, frozen = adapted[0][0], nnx.as_pure(adapted[0][2])
    start = jax.tree.map(
        lambda *x: jnp.stack(x), *(nnx.as_pure(params) for _, params, _ in adapted)
    )
    rates = jnp.array([learning_rate_at(step, steps, PEAK) for step in range(steps)])
    arms = cell.arms()
    optimizers = [
        loft_adamw(
            lambda step: rates[step],
            weight_decay=0.0,
            second_moment=second_moment,
            max_norm=MAX_NORM,
            balance=balance,
            pairs=rule,
        )
        for second_moment, balance in arms
    ]

    def loss(params: Any, frozen: Any, windows: jax.Array) -> jax.Array:
        return text.next_token_loss(nnx.merge(graphdef, params, frozen), windows).mean()

    def of_all(of_one: Callable, params: Sequence[Any], frozen: Any, windows: jax.Array) -> Any:
        """Maps a function over the seeds (axis 0 of parameters and windows) of all arms."""
        every = jax.tree.map(lambda *x: jnp.concatenate(x), *params)
        windows = jnp.tile(windows, (len(params), 1, 1))
        found = jax.vmap(of_one, (0, None, 0))(every, frozen, windows)
        slices = [slice(k * len(SEEDS), (k + 1) * len(SEEDS)) for k in range(len(params))]
        return [jax.tree.map(lambda x, part=part: x[part], found) for part in slices]

    losses_of = jax.jit(lambda *args: of_all(loss, *args))
    gradients_of = jax.jit(lambda *args: of_all(jax.value_and_grad(loss), *args))

    def stepper(tx: optax.GradientTransformation) -> Callable[..., tuple[Any, Any]]:
        def update(of_seed: tuple[Any, Any, Any]) -> tuple[Any, Any]:
            gradients, state, params = of_seed
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        # One seed after another, so that branches stay branches.
        return jax.jit(lambda *args: jax.lax.map(update, args))

    updates = [stepper(tx) for tx in optimizers]
    states = [jax.jit(jax.vmap(tx.init))(start) for tx in optimizers]
    params, losses, windows = [start] * len(arms), [], data.train[cell.length]
    began = time.perf_counter()
    for k in range(steps):
        drawn = np.stack([batch_at(windows, cell.sequences, seed, k) for seed in SEEDS])
        found = gradients_of(params, frozen, drawn)
        losses.append(np.stack([np.asarray(values) for values, _ in found]))
        for i, (_, gradients) in enumerate(found):
            params[i], states[i] = updates[i](gradients, states[i], params[i])
    parts = [
        np.broadcast_to(part, (len(SEEDS), *part.shape))
        for part in data.held_out.reshape(-1, HELD_OUT_BATCH, data.held_out.shape[1])
    ]
    final = np.mean([np.stack(losses_of(params, frozen, part)) for part in parts], axis=0)
    # Adapters start at zero, so all runs start at the same loss.
    before = np.mean([losses_of([start], frozen, part)[0] for part in parts])
    return [
        {
            **cell._asdict(),
            "second_moment": arm[0],
            "balance": arm[1],
            "seed": seed,
            "steps": steps,
            "before": _rounded(before),
            "final": _rounded(final[i, j]),
            "largest": _rounded(max(jnp.abs(x[j]).max() for x in jax.tree.leaves(params[i]))),
            "train_losses": [_rounded(x[i, j]) for x in losses],
            "seconds_of_all": round(time.perf_counter() - began, 1),
        }
        for i, arm in enumerate(arms)
        for j, seed in enumerate(SEEDS)
    ]


def _rounded(x: Any) -> float | None:
    return float(f"{x:.5g}") if np.isfinite(x) else None


def missing(cells: Sequence[Cell], rows: Sequence[Row]) -> list[Cell]:
    """The cells without rows."""
    known = {tuple(row[name] for name in Cell._fields) for row in rows}
    return [cell for cell in cells if tuple(cell) not in known]


def table(rows: Sequence[Row]) -> str:
    """Held-out losses, and how each in bfloat16 differs from that of float32 by seed."""
    names = ("sequences", "length", "second_moment", "rank", "dtype", "balance")
    runs: dict[tuple, dict[int, Row]] = {}
    for row in rows:
        runs.setdefault(tuple(row[name] for name in names), {})[row["seed"]] = row
    lines = []
    for key, of_seeds in sorted(
        runs.items(), key=lambda run: (*run[0][:4], run[0][4] == "bfloat16", not run[0][5])
    ):
        sequences, length, second_moment, rank, dtype, balance = key
        exact = runs.get((*key[:4], "float32", True), {})
        differences = [
            f"{row['final'] - exact[seed]['final']:+.4f}" if row["final"] is not None else "NaN"
            for seed, row in of_seeds.items()
            if dtype != "float32" and seed in exact
        ]
        finals = [row["final"] for row in of_seeds.values()]
        largest = [row["largest"] for row in of_seeds.values()]
        lines.append(
            [
                f"{sequences} x {length}",
                second_moment,
                rank,
                dtype if balance else f"{dtype}, balance=False",
                "NaN" if None in finals else f"{np.mean(finals):.4f}",
                ", ".join(differences),
                "infinite" if None in largest else f"{max(largest):.2g}",
            ]
        )
    heads = ["tokens", "second moment", "rank", "forward", "loss", "minus float32", "largest entry"]
    return markdown.table(heads, lines)


def load_data(folder: Path, tokenizer: Any, lengths: set[int]) -> Data:
    """Reads and tokenizes both files."""

    def windows(name: str, length: int) -> np.ndarray:
        found = [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
        if not found:
            raise UserError(f"{folder} has no {name} (or {name}.gz).")
        return text.windows(tokenizer, text.load_documents(str(found[0])), length, name)

    train = {length: windows("wikitext2-train.txt", length) for length in lengths}
    return Data(train, spread(windows("wikitext2-valid.txt", HELD_OUT_LENGTH), HELD_OUT))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="folder with the data files; none: show FILE")
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 16])
    add_results(parser)


def run(options: argparse.Namespace) -> None:
    path = options.results
    rows = read(path) if path is not None and path.exists() else []
    every = [
        Cell(sequences, length, rank, dtype)
        for rank in options.ranks
        for sequences, length in SIZES
        for dtype in ("float32", "bfloat16")
    ]
    cells = missing(every, rows)
    if options.data is not None and cells:
        pretrained = llama_weights.load(None)
        data = load_data(options.data, pretrained.tokenizer, {cell.length for cell in cells})
        base = pretrained.build()
        del pretrained  # its arrays are as large as the model
        for cell in cells:
            rule = llama.lora_rule(TARGETS, cell.rank, cell.rank)
            new = train(in_dtype(base, cell.dtype), data, rule, cell)
            append(path, new)
            rows += new
            print(cell, [row["final"] for row in new], flush=True)
            jax.clear_caches()  # frees the programs of the last cell
    print(table(rows))
