"""Fine-tunes SmolLM2-135M on WikiText-2 with every method at several learning rates and seeds.

    python benchmarks/wikitext2.py --train wiki.valid.txt --test wiki.test.txt

Twenty steps of 4 x 128 tokens from the validation split, loss on windows of the test split; rank 4
on Q, K, V, Up, Down; warm-up over 10 % of the steps, then linear decay to zero; clipping at 1, no
weight decay. About 80 s a run on two CPU cores. Results are appended to a JSON-lines file, and runs
that it has are not made again; then the table is printed and the figure drawn. To save time, search
the rates with `--seeds 0` and give the best ones more seeds with `--rates`.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.common import batches
from examples.common.data import text
from examples.common.data.text import next_token_loss
from examples.common.methods import make_optimizer, trainable
from examples.common.models import llama_weights as weights
from examples.common.models.llama import lora_rule
from examples.common.training import Trainer, learning_rate_at
from loft_jax.adapters import add_lora, lora_pairs

FULL_RATES = (1e-4, 3e-4, 1e-3)
RATES = {
    "full": FULL_RATES,
    "loft calibrated": (*FULL_RATES, 3e-3),
    "loft factored": (*FULL_RATES, 3e-3),
    "loft diagonal": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "lora": (1e-3, 3e-3, 1e-2, 3e-2),
}
LABELS = {
    "full": "full fine-tuning",
    "loft calibrated": "LoFT, calibrated",
    "loft factored": "LoFT, factored",
    "loft diagonal": "LoFT (simple)",
    "lora": "LoRA",
}
NAMES = {"loft calibrated": "loft", "loft factored": "factored", "loft diagonal": "simple"}
"""What the examples call the methods, where the results have other names."""
TARGETS = ("q", "k", "v", "up", "down")
RESULTS = Path(__file__).parent / "results"


def examples_name(method: str) -> str:
    return NAMES.get(method, method)


def optimizer_for(method: str, rank: int, learning_rate: Any):
    pairs = lora_pairs(lora_rule(TARGETS, rank, rank))
    return make_optimizer(examples_name(method), learning_rate, pairs=pairs)


def make_model(pretrained: weights.Pretrained, method: str, rank: int, seed: int) -> nnx.Module:
    model = pretrained.build()
    if method == "full":
        return model
    return add_lora(model, lora_rule(TARGETS, rank, rank), rngs=nnx.Rngs(seed))


def run_once(
    trainer: Trainer,
    model: nnx.Module,
    data: tuple[np.ndarray, np.ndarray],
    options: argparse.Namespace,
    rate: float,
    seed: int,
) -> dict[str, Any]:
    """One training run: the test loss of each window, and what it took."""
    train, test = data
    state, began, losses = trainer.start(model), time.perf_counter(), []
    for step, batch in enumerate(batches.batches(train, 4, seed, range(options.steps))):
        state, loss = trainer.step(state, batch, learning_rate_at(step, options.steps, rate))
        losses.append(round(float(loss), 5))
    seconds = time.perf_counter() - began
    loss = float(trainer.evaluate(state.params, test, 4).mean())
    return {"test_loss": round(loss, 5), "train_losses": losses, "seconds": round(seconds, 1)}


def run_all(options: argparse.Namespace) -> None:
    """Makes the runs that are not in the results yet, all of one compiled step together."""
    path = options.results
    done = {(r["method"], r["rate"], r["seed"]) for r in read(path)}
    pretrained = weights.load(None)
    train, test = (
        text.windows(pretrained.tokenizer, text.load_documents(str(source)), 128, name)
        for source, name in ((options.train, "training"), (options.test, "test"))
    )
    data = train, batches.spread(test, options.windows)
    for method in options.methods:
        wanted = [
            (rate, seed)
            for seed in options.seeds
            for rate in options.rates or RATES[method]
            if (method, rate, seed) not in done
        ]
        if not wanted:
            continue
        model = make_model(pretrained, method, options.rank, 0)
        trainer = Trainer(
            model,
            next_token_loss,
            lambda rate, method=method: optimizer_for(method, options.rank, rate),
            trainable(examples_name(method)),
        )
        if ("zero-shot", 0.0, 0) not in done:
            loss = float(trainer.evaluate(trainer.start(model).params, data[1], 4).mean())
            append(path, {"method": "zero-shot", "rate": 0.0, "seed": 0, "test_loss": loss})
            done.add(("zero-shot", 0.0, 0))
        for rate, seed in wanted:
            model = make_model(pretrained, method, options.rank, seed)
            outcome = run_once(trainer, model, data, options, rate, seed)
            record = {"method": method, "rate": rate, "seed": seed, "rank": options.rank}
            append(path, record | {"steps": options.steps} | outcome | environment())
            print(f"{method:16} rate {rate:g} seed {seed}: {outcome['test_loss']:.4f}", flush=True)


def environment() -> dict[str, str]:
    return {"jax": jax.__version__, "machine": f"{platform.machine()} {jax.default_backend()}"}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def cells(records: Sequence[dict[str, Any]]) -> Iterator[tuple[str, float, np.ndarray]]:
    """(method, rate, test losses by seed) of each cell of the table."""
    for method, rates in RATES.items():
        for rate in rates:
            found = sorted(
                (r["seed"], r["test_loss"])
                for r in records
                if (r["method"], r["rate"]) == (method, rate)
            )
            if found:
                yield method, rate, np.array([loss for _, loss in found])


def print_table(records: Sequence[dict[str, Any]]) -> None:
    start = next(r["test_loss"] for r in records if r["method"] == "zero-shot")
    best = {}
    for method, rate, losses in cells(records):
        if method not in best or losses.mean() < best[method][1].mean():
            best[method] = rate, losses
    print(f"\ntest loss before training: {start:.4f}\n")
    print("| method | learning rate | test loss | spread over seeds | seeds | |")
    print("|---|---|---|---|---|---|")
    for method, rate, losses in cells(records):
        mark = "best" if best[method][0] == rate else ""
        print(
            f"| {LABELS[method]} | {rate:g} | {losses.mean():.4f} | "
            f"{losses.min():.4f} to {losses.max():.4f} | {len(losses)} | {mark} |"
        )


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for method, label in LABELS.items():
        points = [(rate, losses) for name, rate, losses in cells(records) if name == method]
        if points:
            rates = [rate for rate, _ in points]
            means = np.array([losses.mean() for _, losses in points])
            low = means - [losses.min() for _, losses in points]
            high = np.array([losses.max() for _, losses in points]) - means
            axes.errorbar(rates, means, yerr=[low, high], marker="o", capsize=3, label=label)
    axes.set(xscale="log", xlabel="peak learning rate", ylabel="test loss (nats a token)")
    axes.set_title("SmolLM2-135M on WikiText-2, 20 steps, rank 4")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--train", type=Path, help="WikiText-2's validation split, a text file")
    parser.add_argument("--test", type=Path, help="WikiText-2's test split")
    parser.add_argument("--methods", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", type=float, help="instead of each method's grid")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--windows", type=int, default=48, help="test windows of 128 tokens")
    parser.add_argument("--results", type=Path, default=RESULTS / "wikitext2.jsonl")
    parser.add_argument("--figure", type=Path, help="default: beside the results")
    options = parser.parse_args()
    if options.train and options.test:
        run_all(options)
    elif not options.results.exists():
        parser.error("give --train and --test: the two text files of WikiText-2")
    records = read(options.results)
    print_table(records)
    draw(records, options.figure or options.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
