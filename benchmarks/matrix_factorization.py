"""LoFT, its ablations and its peers on matrix factorization: the paper's Figure 2, and its lemmas.

    python benchmarks/matrix_factorization.py

Minimises the distance of ``W`` (1024 x 512) to a random matrix ``A`` of rank 8 in 300 steps, with
``W`` itself (full fine-tuning) or with a rank-8 adapter from LoRA's zero initialisation, on three
seeds, in two regimes:

- the paper's setting: mean-squared error, learning rate 10, epsilon 1e-4. Gradients lie under
  epsilon there, so that Adam is momentum descent with the learning rate 1e5.
- a true Adam regime: squared error, epsilon 1e-10. The learning rate is full fine-tuning's, and all
  methods of its family share it, as the paper asks: the smallest whose final loss is within a
  factor of two of the best. Momentum and Muon follow a full fine-tuning of their own; with Muon,
  whose steps do not shrink by themselves, the rate falls linearly to zero.

Then the distance of LoFT to the exact trajectory where the paper proves it zero (Lemma 1, Lemma 2,
full rank), in float64 and float32. Prints the table and draws the figure, in under five minutes on
two CPU cores; `--output` names another folder for them.
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
from matrix_factorization_exact import exactness

from loft_jax import baselines, loft_adamw, loft_muon, loft_sgd

M, N, RANK, STEPS, SEEDS = 1024, 512, 8, 300, (0, 1, 2)


@dataclasses.dataclass(frozen=True)
class Method:
    """A line of the table.

    Attributes:
      label: its name.
      make: ``(learning rate, epsilon) ->`` the optimizer.
      family: whose learning rate it shares: that of full fine-tuning with "adam", "momentum" or
        "muon".
      full: trains ``W`` itself.
      core: runs on the r x r core of the target, see `core_of`.
    """

    label: str
    make: Callable[..., optax.GradientTransformation]
    family: str = "adam"
    full: bool = False
    core: bool = False


def _loft(**options: Any) -> Callable[..., optax.GradientTransformation]:
    return lambda rate, eps: loft_adamw(rate, eps=eps, weight_decay=0.0, **options)


def _peer(make: Callable[..., Any], **options: Any) -> Callable[..., optax.GradientTransformation]:
    return lambda rate, eps: make(rate, eps=eps, **options)


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
    Method("LoRA+", _peer(baselines.lora_plus)),
    Method("scaled AdamW", _peer(baselines.scaled_adamw)),
    Method("LoRA-FA", _peer(baselines.lora_fa)),
    Method("AltLoRA+", _peer(baselines.altlora_plus)),
    Method("LoRA-Pro", _peer(baselines.lora_pro)),
    Method("full, momentum", lambda rate, eps: optax.sgd(rate, 0.9), "momentum", full=True),
    Method("LoFT-SGD, momentum", lambda rate, eps: loft_sgd(rate, 0.9), "momentum"),
    # Its momentum is an average, ten times smaller than a sum.
    Method("AltLoRA", lambda rate, eps: baselines.altlora(10 * rate), "momentum"),
    Method("scaled SGD", lambda rate, eps: baselines.scaled_sgd(10 * rate), "momentum"),
    Method("full, Muon", lambda rate, eps: _full_muon(rate), "muon", full=True, core=True),
    Method("LoFT-Muon", lambda rate, eps: loft_muon(_falling(rate)), "muon"),
)


def _falling(rate: float) -> optax.Schedule:
    return optax.linear_schedule(rate, 0.0, STEPS)


def _full_muon(rate: float) -> optax.GradientTransformation:
    return optax.contrib.muon(_falling(rate), eps=1e-7, nesterov=False)


@dataclasses.dataclass(frozen=True)
class Regime:
    label: str
    normalise: bool
    eps: float

    def loss(self, residual: jax.Array) -> jax.Array:
        return jnp.sum(residual**2) / (residual.size if self.normalise else 1)

    def rate(self, method: Method, tuned: dict[str, float]) -> float:
        return 10.0 if self is PAPER else tuned[method.family]

    @property
    def methods(self) -> tuple[Method, ...]:
        """Its learning rate and epsilon are Adam's: the paper's setting says nothing of others."""
        return tuple(x for x in METHODS if x.family == "adam" or self is ADAM)


PAPER = Regime("paper's setting", True, 1e-4)
ADAM = Regime("Adam regime", False, 1e-10)
SWEEP = (0.03, 0.1, 0.3, 1.0, 3.0)
GRIDS = {"adam": SWEEP, "momentum": (0.003, 0.01, 0.03, 0.1, 0.3), "muon": (1.0, 3.0, 10.0, 30.0)}
SWEPT = ("full fine-tuning", "LoRA", "LoFT", "LoFT, no alternation", "LoFT, factored")
IN_FLOAT32 = ("full fine-tuning", "LoRA", "LoFT", "LoFT, factored", "LoFT (simple)")


def problem(seed: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The target, and `lora_a` as `torch.nn.Linear` draws it (the paper's start)."""
    rng = np.random.default_rng(seed)
    target = rng.normal(size=(M, RANK)) @ rng.normal(size=(RANK, N))
    return jnp.asarray(target, dtype), jnp.asarray(rng.uniform(-1, 1, (M, RANK)) / M**0.5, dtype)


def core_of(target: jax.Array) -> jax.Array:
    """Returns the target in orthonormal bases of its column and row space, ``r x r``.

    From ``W = 0`` Muon on ``W`` never leaves these spaces, and is the same in any such bases. This
    spares it hundreds of thousands of large products.
    """
    u, _, vt = jnp.linalg.svd(target, full_matrices=False)
    return u[:, :RANK].T @ target @ vt[:RANK].T


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def losses(
    method: Method, regime: Regime, rate: float, target: jax.Array, a: jax.Array
) -> jax.Array:
    """The loss before each step and after the last, relative to the first."""
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
    """`losses` for each seed, ``(seeds, STEPS + 1)``."""
    with jax.enable_x64(dtype == np.float64):
        runs = (losses(method, regime, rate, *problem(seed, dtype)) for seed in SEEDS)
        return np.stack([np.asarray(run, np.float64) for run in runs])


def tune(sweep: dict[tuple[str, float], np.ndarray]) -> dict[str, float]:
    """The smallest learning rate of each full fine-tuning that is nearly the best one."""
    tuned = {}
    for full in (method for method in METHODS if method.full):
        final = {rate: final_loss(sweep[full.label, rate]) for rate in GRIDS[full.family]}
        best = min(final.values())
        tuned[full.family] = min(rate for rate, loss in final.items() if loss <= 2 * best)
    return tuned


def final_loss(curve: np.ndarray) -> float:
    """The median over seeds of the last loss; infinite where a run diverged."""
    return float(np.median(np.nan_to_num(curve[:, -1], nan=np.inf)))


def follows(loft: np.ndarray, full: np.ndarray) -> bool:
    """Whether each seed's final loss is within 10 x of full fine-tuning's, or under 1e-11."""
    return bool(np.all((loft[:, -1] <= 10 * full[:, -1]) | (loft[:, -1] < 1e-11)))


def measure() -> dict[str, Any]:
    """Runs everything; curves are in float64 unless their key says float32."""
    sweep = {}
    for method in METHODS:
        if method.full or method.label in SWEPT:
            for rate in GRIDS[method.family]:
                sweep[method.label, rate] = curves(method, ADAM, rate, np.float64)
                _say(f"{method.label}, rate {rate:g}", sweep[method.label, rate])
    tuned = tune(sweep)
    found: dict[str, Any] = {"sweep": sweep, "tuned": tuned, "float32": {}}
    for regime in (PAPER, ADAM):
        of_regime = found[regime.label] = {}
        for method in regime.methods:
            rate = regime.rate(method, tuned)
            known = sweep.get((method.label, rate)) if regime is ADAM else None
            run = curves(method, regime, rate, np.float64) if known is None else known
            of_regime[method.label] = run
            _say(f"{regime.label}: {method.label}", run)
            if method.label in IN_FLOAT32:
                found["float32"][regime.label, method.label] = curves(
                    method, regime, rate, np.float32
                )
    found["exact"] = exactness()
    return found


def _say(what: str, curve: np.ndarray) -> None:
    print(f"{what:42s}", *(f"{loss:8.1e}" for loss in curve[:, -1]), flush=True)


def table(found: dict[str, Any]) -> str:
    """The final losses as Markdown."""
    lines = [
        "| method | paper's setting | Adam regime | float32: paper's | float32: Adam |",
        "|---|---|---|---|---|",
    ]
    for method in METHODS:
        cells = [method.label]
        for runs in (found[PAPER.label], found[ADAM.label]):
            cells.append(_cell(runs.get(method.label)))
        for regime in (PAPER, ADAM):
            cells.append(_cell(found["float32"].get((regime.label, method.label))))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(curve: np.ndarray | None) -> str:
    if curve is None:
        return ""
    final = np.sort(np.nan_to_num(curve[:, -1], nan=np.inf))
    if final[-1] >= 1:
        return "diverges" if final[0] >= 1 else f"{final[0]:.0e} to diverging"
    low, middle, high = (f"{x:.1e}" for x in final[[0, len(final) // 2, -1]])
    return middle if low == high else f"{middle} ({low} to {high})"


def verdicts(found: dict[str, Any]) -> list[str]:
    """Where LoFT follows full fine-tuning and where it does not, learning rate by rate."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("build/matrix_factorization"))
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
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
    (output / "table.md").write_text(text + "\n")
    print(f"\n{text}")
    from matrix_factorization_figure import draw

    draw(found, output / "matrix_factorization.png")
    print(f"figure and table in {output}")


if __name__ == "__main__":
    main()
