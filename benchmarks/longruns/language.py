"""Fine-tunes a byte-level transformer from prose to Python, for long enough that the rank binds.

    python -m benchmarks.longruns language --text wikitext2-train.txt.gz --method full --rate 3e-3

The model is first trained on the bytes of a text, once; --cache keeps it. Then it is fine-tuned on
the sources of Python's standard library, all of its kernels or adapters on all of them. Files are
held out for the test loss, in nats a byte. A run that the results have already is skipped.
"""

import argparse
import functools
import gzip
import sysconfig
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import records
from benchmarks.longruns import model
from benchmarks.longruns.methods import METHODS, renewal_of, warmup_cosine
from examples.common.errors import UserError

RESULTS = Path(__file__).parent / "results" / "language.jsonl"
LAYERS, WIDTH, LENGTH, BATCH = 2, 128, 64, 8
TEST_BATCHES = 64
KEYS = ("method", "rate", "rank", "seed", "steps", "layers", "width", "length", "batch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=Path, required=True, help="to train on first, maybe gzipped")
    parser.add_argument("--method", choices=METHODS, nargs="+", required=True, metavar="METHOD")
    parser.add_argument("--rate", type=float, nargs="+", required=True, help="peak learning rates")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--pretraining-steps", type=int, default=4000)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--length", type=int, default=LENGTH, help="bytes a sequence")
    parser.add_argument("--batch", type=int, default=BATCH, help="sequences a step")
    parser.add_argument("--cache", type=Path, default=Path("longruns-pretrained.npz"))
    parser.add_argument("--results", type=Path, default=RESULTS)


def run(options: argparse.Namespace) -> None:
    train, test = python_sources()
    pretrained = _pretrained(options)
    print(
        f"test loss before fine-tuning: {_test_loss(pretrained, None, test, options):.4f}",
        flush=True,
    )
    done = records.read(options.results) if options.results.exists() else []
    for seed in options.seed:
        for name in options.method:
            for rate in options.rate:
                settings = {k: getattr(options, k, None) for k in KEYS}
                settings |= {"method": name, "rate": rate, "seed": seed}
                if any(all(row[k] == settings[k] for k in KEYS) for row in done):
                    continue
                row = settings | fine_tune(pretrained, train, test, settings, options)
                print(
                    {k: row[k] for k in ("method", "rate", "seed", "loss", "seconds")}, flush=True
                )
                records.append(options.results, [row])


def fine_tune(
    pretrained: Any, train: np.ndarray, test: np.ndarray, settings: Any, options: argparse.Namespace
) -> dict[str, Any]:
    """Returns the test losses along a run and its seconds a step."""
    method, steps = METHODS[settings["method"]], options.steps
    tx = method.optimizer(warmup_cosine(settings["rate"], steps))
    key, of_adapters = jax.random.split(jax.random.key(settings["seed"]))
    draw = functools.partial(model.new_adapters, params=pretrained, rank=options.rank)
    # What is trained; the rest is the base.
    trained = _kernels(pretrained) if method.full else draw(of_adapters)
    base, state = pretrained, tx.init(trained)
    objective = _of_kernels if method.full else _of_adapters
    chunk = jax.jit(functools.partial(_train, tx, objective))
    change = jax.jit(renewal_of(method, draw, tx))
    interval = method.interval or steps // 6
    curve, seconds = [], 0.0
    for start in range(0, steps, interval):
        count = min(interval, steps - start)
        batches = _batches(train, np.random.default_rng([settings["seed"], start]), count, options)
        begin = time.perf_counter()
        base, trained, state = chunk(base, trained, state, batches)
        if method.interval and start + count < steps:
            key, used = jax.random.split(key)
            base, trained, state = change(base, trained, state, used)
        jax.block_until_ready(trained)
        seconds += time.perf_counter() - begin
        if (start + count) % (steps // 6) < interval or start + count == steps:
            loss = _test_loss(*_parts(method.full, base, trained), test, options)
            curve.append([start + count, round(loss, 5)])
    return {"loss": curve[-1][1], "curve": curve, "seconds": round(seconds / steps, 4)}


def _train(tx: optax.GradientTransformation, objective: Callable[..., jax.Array], base, trained,
           state, batches):  # fmt: skip
    def step(carry: Any, batch: jax.Array) -> tuple[Any, None]:
        trained, state = carry
        gradients = jax.grad(objective)(trained, base, batch)
        updates, state = tx.update(gradients, state, trained)
        return (optax.apply_updates(trained, updates), state), None

    (trained, state), _ = jax.lax.scan(step, (trained, state), batches)
    return base, trained, state


def _of_adapters(adapters: Any, base: Any, batch: jax.Array) -> jax.Array:
    return model.loss(base, adapters, batch)


def _of_kernels(kernels: Any, base: Any, batch: jax.Array) -> jax.Array:
    return model.loss(_parts(True, base, kernels)[0], None, batch)


def _kernels(params: Any) -> Any:
    layers = params["layers"]
    return {"layers": {name: x for name, x in layers.items() if isinstance(x, dict)}}


def _parts(full: bool, base: Any, trained: Any) -> tuple[Any, Any]:
    """Returns parameters and adapters."""
    if not full:
        return base, trained
    return {**base, "layers": {**base["layers"], **trained["layers"]}}, None


def python_sources() -> tuple[np.ndarray, np.ndarray]:
    """Returns the bytes of the standard library's sources, and those of held-out files."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(x for x in folder.rglob("*.py") if "site-packages" not in x.parts)
    files = [x for x in files if "test" not in x.parts and "idle_test" not in x.parts]
    split: list[list[bytes]] = [[], []]
    for file in files:
        held_out = zlib.crc32(str(file.relative_to(folder)).encode()) % 10 == 0
        split[held_out].append(file.read_bytes())
    train, test = (np.frombuffer(b"\n".join(part), np.uint8) for part in split)
    return train, test


def _batches(
    text: np.ndarray, rng: np.random.Generator, count: int, options: argparse.Namespace
) -> jax.Array:
    """Returns `count` batches of random windows."""
    starts = rng.integers(0, len(text) - options.length - 1, (count, options.batch, 1))
    return jnp.asarray(text[starts + np.arange(options.length + 1)])


def _test_loss(params: Any, adapters: Any, text: np.ndarray, options: argparse.Namespace) -> float:
    """The mean over some batches, the same in all runs."""
    batches = _batches(text, np.random.default_rng(0), TEST_BATCHES, options)
    return float(_mean_loss(params, adapters, batches))


@jax.jit
def _mean_loss(params: Any, adapters: Any, batches: jax.Array) -> jax.Array:
    return jnp.mean(jax.lax.map(lambda batch: model.loss(params, adapters, batch), batches))


def _pretrained(options: argparse.Namespace) -> Any:
    """The model trained on the text, from the cache if it is there."""
    params = model.init(jax.random.key(1), options.layers, options.width, options.length)
    leaves, treedef = jax.tree.flatten(params)
    if options.cache.exists():
        with np.load(options.cache) as file:
            found = [jnp.asarray(file[f"arr_{k}"]) for k in range(len(leaves))]
        if [x.shape for x in found] != [x.shape for x in leaves]:
            raise UserError(f"{options.cache} holds another model. Give another --cache.")
        return treedef.unflatten(found)
    data = options.text.read_bytes()
    text = np.frombuffer(gzip.decompress(data) if options.text.suffix == ".gz" else data, np.uint8)
    tx = optax.adamw(warmup_cosine(3e-3, options.pretraining_steps), weight_decay=0.0)
    chunk = jax.jit(functools.partial(_train, tx, lambda p, _, batch: model.loss(p, None, batch)))
    state, rng = tx.init(params), np.random.default_rng(1)
    for start in range(0, options.pretraining_steps, 500):
        count = min(500, options.pretraining_steps - start)
        _, params, state = chunk(None, params, state, _batches(text, rng, count, options))
        print(f"pretraining, step {start + count}", flush=True)
    np.savez(options.cache, *jax.tree.leaves(params))
    return params
