"""Compares LoFT, its ablations and the baselines on matrix factorization, and tests the lemmas.

    python -m benchmarks.factorization

The benchmark reproduces the paper's Figure 2. It minimizes the distance of ``W`` (1024 x 512) to a
random matrix ``A`` of rank 8 in 300 steps, with ``W`` itself (full fine-tuning) or with a rank-8
adapter from LoRA's zero initialization, on three seeds, in two regimes:

- The paper's setting: mean squared error, learning rate 10, epsilon 1e-4. Gradients are smaller
  than epsilon there, so Adam is momentum descent with the learning rate 1e5.
- A true Adam regime: squared error, epsilon 1e-10. All methods share the learning rate of full
  fine-tuning, as the paper requires: the smallest whose final loss is within a factor of two of the
  best. Momentum and Muon use the learning rate of full fine-tuning with momentum and with Muon. The
  learning rate of Muon, whose steps do not shrink by themselves, decays linearly to zero.

It then measures the distance of LoFT to the exact trajectory where the paper proves it zero
(Lemma 1, Lemma 2, full rank), in float64 and float32. It prints a table and draws a figure, in less
than five minutes on two CPU cores.
"""

import argparse
import dataclasses
import functools
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import markdown
from benchmarks.factorization.exact import exactness
from benchmarks.factorization.figure import draw
from loft_jax import baselines, loft_adamw, loft_muon, loft_sgd

M, N, RANK, STEPS, SEEDS = 1024, 512, 8, 300, (0, 1, 2)


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
      label: the name.
      make: ``(learning rate, epsilon) ->`` the optimizer.
      family: "adam", "momentum" or "muon": the full fine-tuning whose learning rate it uses.
      full: trains ``W`` itself.
      core: runs on the r x r core of the target (`core_of`).
    """

    label: str
    make: Callable[..., optax.GradientTransformation]
    family: str = "adam"
    full: bool = False
    core: bool = False


def _loft(**options: Any) -> Callable[..., optax.GradientTransformation]:
    return lambda rate, eps: loft_adamw(rate, eps=eps, weight_decay=0.0, **options)


def _baseline(make: Callable[..., Any]) -> Callable[..., optax.GradientTransformation]:
    return lambda rate, eps: make(rate, eps=eps)


METHODS = (
    Method("full fine-tuning", lambda rate, eps: optax.adam(rate, eps=eps), full=True),
    Method("LoRA", lambda rate, eps: optax.adam(rate, eps=eps)),
    Method("LoFT", _loft()),
    Method("LoFT, no alternation", _loft(alternate=False)),
    Method("LoFT, no calibration", _loft(calibrate=False)),
    Method("LoFT, neither", _loft(alternate=False, calibrate=False)),
    Method("LoFT, block 2 off", _loft(scale_gradient=False)),
    Method("LoFT, block 5 off", _loft(reconstruct=False)),
    Method("LoFT, factored", _loft(second_moment="factored")),
    Method("LoFT (simple)", _loft(second_moment="diagonal")),
    Method("LoFT (simple), raw factors", _loft(second_moment="diagonal", reconstruct=False)),
    Method("LoRA+", _baseline(baselines.lora_plus)),
    Method("scaled AdamW", _baseline(baselines.scaled_adamw)),
    Method("LoRA-FA", _baseline(baselines.lora_fa)),
    Method("AltLoRA+", _baseline(baselines.altlora_plus)),
    Method("LoRA-Pro", _baseline(baselines.lora_pro)),
    Method("full, momentum", lambda rate, eps: optax.sgd(rate, 0.9), "momentum", full=True),
    Method("LoFT-SGD, momentum", lambda rate, eps: loft_sgd(rate, 0.9), "momentum"),
    # Momentum of AltLoRA is an average, ten times smaller than a sum.
    Method("AltLoRA", lambda rate, eps: baselines.altlora(10 * rate), "momentum"),
    Method("scaled SGD", lambda rate, eps: baselines.scaled_sgd(10 * rate), "momentum"),
    Method("full, Muon", lambda rate, eps: _full_muon(rate), "muon", full=True, core=True),
    Method("LoFT-Muon", lambda rate, eps: loft_muon(_decaying(rate)), "muon"),
)


def _decaying(rate: float) -> optax.Schedule:
    return optax.linear_schedule(rate, 0.0, STEPS)


def _full_muon(rate: float) -> optax.GradientTransformation:
    return optax.contrib.muon(_decaying(rate), eps=1e-7, nesterov=False)


@dataclasses.dataclass(frozen=True)
class Regime:
    """An objective, an epsilon and the learning rates.

    Attributes:
      label: the name.
      normalize: divides the squared error by the number of entries.
      eps: Adam's epsilon.
    """

    label: str
    normalize: bool
    eps: float

    def loss(self, residual: jax.Array) -> jax.Array:
        """The objective."""
        return jnp.sum(residual**2) / (residual.size if self.normalize else 1)

    def rate(self, method: Method, tuned: dict[str, float]) -> float:
        """The learning rate of a method."""
        return 10.0 if self is PAPER else tuned[method.family]

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods that run in it: in the paper's setting the Adam family only."""
        return tuple(x for x in METHODS if x.family == "adam" or self is ADAM)


PAPER = Regime("paper's setting", True, 1e-4)
ADAM = Regime("Adam regime", False, 1e-10)
SWEEP = (0.03, 0.1, 0.3, 1.0, 3.0)
GRIDS = {"adam": SWEEP, "momentum": (0.003, 0.01, 0.03, 0.1, 0.3), "muon": (1.0, 3.0, 10.0, 30.0)}
SWEPT = ("full fine-tuning", "LoRA", "LoFT", "LoFT, no alternation", "LoFT, factored")
IN_FLOAT32 = ("full fine-tuning", "LoRA", "LoFT", "LoFT, factored", "LoFT (simple)")


def problem(seed: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The target, and `lora_a` drawn as in `torch.nn.Linear`, the paper's initialization."""
    rng = np.random.default_rng(seed)
    target = rng.normal(size=(M, RANK)) @ rng.normal(size=(RANK, N))
    return jnp.asarray(target, dtype), jnp.asarray(rng.uniform(-1, 1, (M, RANK)) / M**0.5, dtype)


def core_of(target: jax.Array) -> jax.Array:
    """The target in orthonormal bases of its column and row space, ``r x r``.

    Muon from ``W = 0`` stays in these spaces and does not depend on the bases. This avoids hundreds
    of thousands of large products.
    """
    u, _, vt = jnp.linalg.svd(target, full_matrices=False)
    return u[:, :RANK].T @ target @ vt[:RANK].T


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def losses(
    method: Method, regime: Regime, rate: float, target: jax.Array, a: jax.Array
) -> jax.Array:
    """The loss before each step and after the last, divided by the first."""
    if method.core:
        target = core_of(target)
    if method.full:
        params, weight = {"w": jnp.zeros_like(target)}, lambda p: p["w"]
    else:
        params = {"lora_a": a, "lora_b": jnp.zeros((RANK, N), a.dtype)}
        weight = lambda p: p["lora_a"] @ p["lora_b"]
    tx = method.make(rate, regime.eps)
    loss = lambda p: regime.loss(weight(p) - target)

    def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    (params, _), values = jax.lax.scan(step, (params, tx.init(params)), None, length=STEPS)
    return jnp.append(values, loss(params)) / values[0]


def curves(method: Method, regime: Regime, rate: float, dtype: Any) -> np.ndarray:
    """`losses` of all seeds, ``(seeds, STEPS + 1)``."""
    with jax.enable_x64(dtype == np.float64):
        runs = (losses(method, regime, rate, *problem(seed, dtype)) for seed in SEEDS)
        return np.stack([np.asarray(run, np.float64) for run in runs])


def tune(sweep: dict[tuple[str, float], np.ndarray]) -> dict[str, float]:
    """The smallest learning rate of each full fine-tuning within a factor of two of the best."""
    tuned = {}
    for full in (method for method in METHODS if method.full):
        final = {rate: final_loss(sweep[full.label, rate]) for rate in GRIDS[full.family]}
        best = min(final.values())
        tuned[full.family] = min(rate for rate, loss in final.items() if loss <= 2 * best)
    return tuned


def final_loss(curve: np.ndarray) -> float:
    """The median over seeds of the last loss; a run that diverged counts as infinite."""
    return float(np.median(np.nan_to_num(curve[:, -1], nan=np.inf)))


def follows(loft: np.ndarray, full: np.ndarray) -> bool:
    """Whether the final loss of each seed is within 10 x of full fine-tuning, or below 1e-11."""
    return bool(np.all((loft[:, -1] <= 10 * full[:, -1]) | (loft[:, -1] < 1e-11)))


def measure() -> dict[str, Any]:
    """Runs everything; curves are in float64, except those under "float32"."""
    sweep = {}
    for method in METHODS:
        if method.full or method.label in SWEPT:
            for rate in GRIDS[method.family]:
                sweep[method.label, rate] = curves(method, ADAM, rate, np.float64)
                _print_losses(f"{method.label}, rate {rate:g}", sweep[method.label, rate])
    tuned = tune(sweep)
    found: dict[str, Any] = {"sweep": sweep, "swept": SWEPT, "tuned": tuned, "float32": {}}
    for regime in (PAPER, ADAM):
        of_regime = found[regime.label] = {}
        for method in regime.methods:
            rate = regime.rate(method, tuned)
            known = sweep.get((method.label, rate)) if regime is ADAM else None
            run = curves(method, regime, rate, np.float64) if known is None else known
            of_regime[method.label] = run
            _print_losses(f"{regime.label}: {method.label}", run)
            if method.label in IN_FLOAT32:
                found["float32"][regime.label, method.label] = curves(
                    method, regime, rate, np.float32
                )
    found["exact"] = exactness()
    return found


def _print_losses(what: str, curve: np.ndarray) -> None:
    print(f"{what:42s}", *(f"{loss:8.1e}" for loss in curve[:, -1]), flush=True)


def table(found: dict[str, Any]) -> str:
    """The final losses in Markdown."""
    regimes = (PAPER, ADAM)
    heads = ["method", *(x.label for x in regimes), *(f"{x.label}, float32" for x in regimes)]
    rows = [
        [
            method.label,
            *(_cell(found[x.label].get(method.label)) for x in regimes),
            *(_cell(found["float32"].get((x.label, method.label))) for x in regimes),
        ]
        for method in METHODS
    ]
    return markdown.table(heads, rows)


def _cell(curve: np.ndarray | None) -> str:
    if curve is None:
        return ""
    final = np.sort(np.nan_to_num(curve[:, -1], nan=np.inf))
    if final[-1] >= 1:
        return "diverges" if final[0] >= 1 else f"{final[0]:.0e} to diverging"
    low, middle, high = (f"{x:.1e}" for x in final[[0, len(final) // 2, -1]])
    return middle if low == high else f"{middle} ({low} to {high})"


def verdicts(found: dict[str, Any]) -> list[str]:
    """Where LoFT follows full fine-tuning: in each regime, and at each learning rate."""
    lines = []
    for regime in (PAPER, ADAM):
        for dtype, runs in (
            ("float64", found[regime.label]),
            ("float32", {k: v for (r, k), v in found["float32"].items() if r == regime.label}),
        ):
            verdict = follows(runs["LoFT"], runs["full fine-tuning"])
            lines.append(f"{regime.label}, {dtype}: LoFT follows on each seed: {verdict}")
    for label in SWEPT[2:]:
        rates = [r for r in SWEEP if follows(found["sweep"][label, r], found["sweep"][SWEPT[0], r])]
        lines.append(f"Adam regime: {label} follows at the rates {', '.join(map(str, rates))}")
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    folder = Path("build/matrix_factorization")
    text = f"folder for the table and the figure (default {folder})"
    parser.add_argument("--output", type=Path, default=folder, help=text)


def run(options: argparse.Namespace) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    found = measure()
    text = "\n".join(
        [
            f"Learning rates in the Adam regime: {found['tuned']}",
            "",
            table(found),
            "",
            *(f"- {line}" for line in verdicts(found)),
            *(f"- {label}: largest relative distance {x.max():.1e}" for label, x in found["exact"]),
            "",
            f"{time.perf_counter() - began:.0f} s, {platform.machine()}, jax {jax.__version__}",
        ]
    )
    (options.output / "table.md").write_text(text + "\n")
    print(f"\n{text}")
    draw(found, options.output / "matrix_factorization.png")
    print(f"figure and table in {options.output}")
