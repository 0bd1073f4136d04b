"""Why LoFT's best learning rate is larger: the length of its steps against full fine-tuning's.

    python -m benchmarks.longruns step-length --text wikitext2-train.txt.gz

Runs of 300 steps of the language model, at learning rates a factor of two apart. For each method
the table has its best learning rate (the minimum of a parabola through the three lowest validation
losses, means over seeds, in the logarithm of the rate), and the root mean squares over all entries
of the adapted weights, relative to the learning rate of the step:

- D: Adam's ratio, before it is projected (LoFT: mean of both factors');
- DP: after the projection (LoFT);
- step: the change of the weights in one step;
- drift: their change over 20 steps, divided by 20.

If the length of the steps decides, the best learning rate times the step or the drift is the same
for all methods.
"""

import argparse
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import markdown, records
from benchmarks.longruns import model
from benchmarks.longruns.data import held_out, windows
from benchmarks.longruns.language import Bench, Run, add_sizes
from benchmarks.longruns.methods import METHODS, warmup_cosine
from benchmarks.longruns.training import (
    kernels,
    loss_of_adapters,
    loss_of_kernels,
    mean_loss,
    parts,
)
from loft_jax.algorithm.factored import unpack

RESULTS = Path(__file__).parent / "results" / "step_length.jsonl"
STEPS, SPAN = 300, 20
LOWEST = {"full": 1e-3, "loft": 4e-3, "loft-simultaneous": 2e-3, "lora": 8e-3}
"""The first rate of each method; the others are twice the one before."""
RATES = 4
MEASURED = ("direction", "projected", "step", "drift")


class Lengths(NamedTuple):
    """Mean squares over the entries of all kernels, relative to the squared learning rate."""

    direction: jax.Array
    projected: jax.Array
    step: jax.Array
    drift: jax.Array


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", choices=LOWEST, nargs="+", default=list(LOWEST))
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--rates", type=int, default=RATES)
    parser.add_argument("--seeds", type=int, default=2)
    add_sizes(parser)
    parser.set_defaults(steps=STEPS, results=RESULTS)


def run(options: argparse.Namespace) -> None:
    bench = Bench(options)
    rows = []
    for seed in range(options.seeds):
        for name in options.method:
            for k in range(options.rates):
                rank = None if METHODS[name].full else options.rank
                one = Run(name, rank, LOWEST[name] * 2**k, seed)
                if one not in bench.rows:
                    row = one._asdict() | bench.sizes._asdict() | measure(bench, one)
                    records.append(bench.file, [row])
                    bench.rows[one] = row
                rows.append(bench.rows[one])
                print(*one, *(rows[-1][x] for x in ("validation", *MEASURED)), flush=True)
    print(table(rows))


def table(rows: Sequence[records.Row]) -> str:
    lines = []
    for name in dict.fromkeys(row["method"] for row in rows):
        of_method = [row for row in rows if row["method"] == name]
        rates = sorted({row["rate"] for row in of_method})
        losses = [_mean([r["validation"] for r in of_method if r["rate"] == x]) for x in rates]
        best, nearest = minimum(rates, losses)
        at_best = [row for row in of_method if row["rate"] == nearest]
        lengths = {
            x: None if at_best[0][x] is None else _mean([row[x] for row in at_best])
            for x in MEASURED
        }
        products = [f"{best * (lengths[x] or 0):.2g}" for x in ("step", "drift")]
        shown = [None if x is None else f"{x:.3f}" for x in lengths.values()]
        lines.append([METHODS[name].label, f"{min(losses):.3f}", f"{best:.2g}", *shown, *products])
    heads = ["method", "validation", "best rate", "D", "DP", "step", "drift"]
    return markdown.table([*heads, "rate × step", "rate × drift"], lines)


def minimum(rates: Sequence[float], losses: Sequence[float]) -> tuple[float, float]:
    """The minimum of the parabola through the three lowest points, and the best of the rates.

    At an edge both are the rate of the edge.

    Example:
      >>> best, nearest = minimum([1.0, 2.0, 4.0, 8.0], [3.0, 1.0, 1.0, 9.0])
      >>> round(best, 2), nearest
      (2.64, 2.0)
    """
    k = int(np.argmin(losses))
    if k in (0, len(rates) - 1) or not all(map(math.isfinite, losses[k - 1 : k + 2])):
        return rates[k], rates[k]
    a, b, _ = np.polyfit(np.log(rates[k - 1 : k + 2]), losses[k - 1 : k + 2], 2)
    return math.exp(-b / (2 * a)), rates[k]


def measure(bench: Bench, one: Run) -> dict[str, Any]:
    """Returns the losses of a run and its mean lengths, after the warm-up."""
    full, sizes = METHODS[one.method].full, bench.sizes
    shape = (sizes.batch, sizes.length)
    count = sizes.steps // SPAN * SPAN
    batches = windows(
        bench.texts.train, np.random.default_rng([one.seed, 0]), count, sizes.batch, sizes.length
    )
    follow = _program(one.method, one.rank or 1, sizes.steps)
    rate = jnp.asarray(one.rate, jnp.float32)
    trained, lengths = follow(bench.pretrained, rate, jax.random.key(one.seed), batches)
    loss = lambda text: mean_loss(*parts(full, bench.pretrained, trained), held_out(text, *shape))
    late = Lengths(*(np.asarray(x)[len(x) // 4 :] for x in lengths))
    root = lambda x: None if np.isnan(x).all() else round(float(np.sqrt(np.mean(x))), 4)
    found = {name: root(x) for name, x in late._asdict().items()}
    losses = {"validation": loss(bench.texts.validation), "loss": loss(bench.texts.test)}
    return {k: round(x, 5) if math.isfinite(x) else None for k, x in losses.items()} | found


@functools.cache
def _program(name: str, rank: int, steps: int) -> Any:
    """Returns `(pretrained, rate, key, batches) -> trained, lengths by span of steps`."""
    method = METHODS[name]
    objective = loss_of_kernels if method.full else loss_of_adapters

    def weights(trained: Any) -> Any:
        if method.full:
            return jax.tree.leaves(trained)
        return [x["lora_a"] @ x["lora_b"] for x in trained["layers"].values()]

    def follow(pretrained: Any, rate: jax.Array, key: jax.Array, batches: jax.Array) -> Any:
        schedule = warmup_cosine(rate, steps)
        tx = method.optimizer(schedule)
        start = kernels(pretrained) if method.full else model.new_adapters(key, pretrained, rank)

        def step(carry: Any, item: Any) -> tuple[Any, jax.Array]:
            (trained, state), (k, batch) = carry, item
            gradients = jax.grad(objective)(trained, pretrained, batch)
            updates, state = tx.update(gradients, state, trained)
            new = optax.apply_updates(trained, updates)
            return (new, state), mean_square(weights(trained), weights(new)) / schedule(k) ** 2

        def span(carry: Any, items: Any) -> tuple[Any, Lengths]:
            before = weights(carry[0])
            (trained, state), squares = jax.lax.scan(step, carry, items)
            drift = mean_square(before, weights(trained))
            rates = jax.vmap(schedule)(items[0])
            of_state = _of_loft(state) if name.startswith("loft") else (jnp.nan, jnp.nan)
            lengths = Lengths(*of_state, jnp.mean(squares), drift / jnp.sum(rates) ** 2)
            return (trained, state), lengths

        split = lambda x: x.reshape(-1, SPAN, *x.shape[1:])
        items = split(jnp.arange(len(batches))), split(batches)
        (trained, _), lengths = jax.lax.scan(span, (start, tx.init(start)), items)
        return trained, lengths

    return jax.jit(follow)


def mean_square(before: Sequence[jax.Array], after: Sequence[jax.Array]) -> jax.Array:
    """The mean square of a change, over all entries of all kernels."""
    total = sum(jnp.sum((x - y) ** 2) for x, y in zip(before, after, strict=True))
    return total / sum(x.size for x in before)


def _of_loft(state: Any) -> tuple[jax.Array, jax.Array]:
    """Mean squares of Adam's ratio ``D`` and of ``D P``, over both factors of all kernels."""
    core = state[0]
    square, projected, size = jnp.zeros(()), jnp.zeros(()), 0
    for basis, mu, nu in zip(*(x["layers"].values() for x in core[2:5]), strict=True):
        # Matrices with the long axis first, a batch of layers.
        flat = lambda x: (x["lora_a"], x["lora_b"].mT)
        for m, v, q in zip(flat(mu), flat(nu), reversed(flat(basis)), strict=True):
            ratio = jax.vmap(adam_ratio, (0, 0, 0, None))(m, v, q, core.count)
            square += jnp.sum(ratio**2)
            projected += jnp.sum((ratio @ q) ** 2)
            size += ratio.size
    return square / size, projected / size


def adam_ratio(
    mu: jax.Array, nu: jax.Array, q: jax.Array, count: jax.typing.ArrayLike
) -> jax.Array:
    """The dense ratio ``D`` (``m x n``) of a factor from its moments, with the factored second one.

    Args:
      mu, nu: of the factor, long axis first.
      q: its partner's basis, `(n, r)`.
      count: steps so far.
    """
    rows, gram = unpack(nu, q.shape[1])
    columns = jnp.sum((q @ gram) * q, axis=1)
    second = rows[:, None] * columns[None, :] / jnp.trace(gram) / (1 - 0.999**count)
    return (mu @ q.T) / (1 - 0.9**count) / jnp.sqrt(second)


def _mean(values: Sequence[float | None]) -> float:
    return float(np.mean([math.inf if x is None else x for x in values]))
