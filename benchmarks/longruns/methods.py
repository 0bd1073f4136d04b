"""The methods of the long runs: an optimizer, what it trains, and what happens at intervals."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.longruns.low_rank_steps import adamw_of_rank
from loft_jax import LoraAxes, LoraPairs, baselines, loft_adamw, loft_muon
from loft_jax.adapters import merge, renew

Renew = Callable[[Any, Any, Any, jax.Array], tuple[Any, Any, Any]]
"""`(base, adapters, optimizer state, key) ->` the three to go on with."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table.

    Attributes:
      label: the name.
      optimizer: `learning rate or schedule ->` the transformation.
      full: trains the kernels themselves.
      scale: `rank ->` the factor of the adapter's product.
      magnitude: the adapters are DoRA's.
      interval: after how many steps adapters are renewed; None never.
      renewal: options of `loft_jax.adapters.renew`; None draws a new adapter and makes the state
        of its optimizer anew.
    """

    label: str
    optimizer: Callable[[Any], optax.GradientTransformation]
    full: bool = False
    scale: Callable[[int], float] = lambda rank: 1.0
    magnitude: bool = False
    interval: int | None = None
    renewal: dict[str, Any] | None = None


WARMUP = 20
"""Steps after each new adapter in which the learning rate rises, where a method has this."""

RSLORA_ALPHA = 8
"""PEFT's default. The other methods have a scale of 1 at all ranks."""

PAIRS = LoraPairs(axes=(("layers/.*", LoraAxes(batch=(0,))),))
_adamw = functools.partial(optax.adamw, weight_decay=0.0)
_loft = functools.partial(loft_adamw, weight_decay=0.0, second_moment="factored", pairs=PAIRS)
_of_pairs = lambda optimizer, **options: functools.partial(optimizer, pairs=PAIRS, **options)


def _renewed(interval: int, directions: str, size: float = 1.0, keep: int = 0) -> Method:
    label = f"LoFT, renewed every {interval}: {directions}"
    label += f", {keep} of 4 kept" * (keep > 0) + f", `size={size}`" * (size != 1)
    renewal = {"directions": directions, "size": size, "keep": keep}
    return Method(label=label, optimizer=_loft, interval=interval, renewal=renewal)


def _drawn_anew(
    interval: int, name: str, optimizer: Any, warmup: bool = False, magnitude: bool = False
) -> Method:
    label = f"{name}, drawn anew every {interval}, without its moments"
    if not warmup:
        return Method(label=label, optimizer=optimizer, interval=interval, magnitude=magnitude)

    def with_warmup(rate: optax.Schedule) -> optax.GradientTransformation:
        return optimizer(
            lambda count: rate(count) * jnp.minimum((count % interval + 1) / WARMUP, 1)
        )

    return Method(label=f"{label}, warm-up of {WARMUP}", optimizer=with_warmup, interval=interval)


METHODS = {
    "full": Method(label="full fine-tuning", optimizer=_adamw, full=True),
    "full-rank-4": Method(
        label="full fine-tuning, steps of rank 4", optimizer=adamw_of_rank(4), full=True
    ),
    "full-rank-4-feedback": Method(
        label="full fine-tuning, steps of rank 4, the rest kept for later",
        optimizer=adamw_of_rank(4, feedback=True),
        full=True,
    ),
    "lora": Method(label="LoRA", optimizer=_adamw),
    "rslora": Method(
        label=f"rsLoRA, alpha = {RSLORA_ALPHA}",
        optimizer=_adamw,
        scale=lambda rank: RSLORA_ALPHA / rank**0.5,
    ),
    "dora": Method(label="DoRA", optimizer=_adamw, magnitude=True),
    "loft-dora": Method(label="DoRA with LoFT", optimizer=_loft, magnitude=True),
    "lora-rite": Method(label="LoRA-RITE", optimizer=_of_pairs(baselines.lora_rite)),
    # The default of its released code.
    "lora-rite-no-escape": Method(
        label="LoRA-RITE, no escaped mass",
        optimizer=_of_pairs(baselines.lora_rite, escaped_mass=False),
    ),
    "lora-pro": Method(label="LoRA-Pro", optimizer=_of_pairs(baselines.lora_pro)),
    "altlora": Method(label="AltLoRA+", optimizer=_of_pairs(baselines.altlora_plus)),
    "lora-muon": Method(label="LoRA, Muon on the factors", optimizer=optax.contrib.muon),
    "loft": Method(label="LoFT, factored", optimizer=_loft),
    "loft-calibrated": Method(
        label="LoFT, calibrated", optimizer=functools.partial(_loft, second_moment="calibrated")
    ),
    "loft-simple": Method(
        label="LoFT (simple)", optimizer=functools.partial(_loft, second_moment="diagonal")
    ),
    "loft-simultaneous": Method(
        label="LoFT, factored, no alternation", optimizer=functools.partial(_loft, alternate=False)
    ),
    "loft-uncalibrated": Method(
        label="LoFT, factored, no calibration", optimizer=functools.partial(_loft, calibrate=False)
    ),
    "loft-muon": Method(label="LoFT-Muon", optimizer=_of_pairs(loft_muon, weight_decay=0.0)),
    **{f"lora-anew-{k}": _drawn_anew(k, "LoRA", _adamw) for k in (25, 100, 250, 500)},
    **{f"loft-anew-{k}": _drawn_anew(k, "LoFT", _loft) for k in (25, 50, 100, 250, 500, 1000)},
    **{
        f"loft-dora-anew-{k}": _drawn_anew(k, "DoRA with LoFT", _loft, magnitude=True)
        for k in (250, 500)
    },
    **{f"loft-anew-{k}-warm": _drawn_anew(k, "LoFT", _loft, warmup=True) for k in (50, 100, 250)},
    **{f"random-{k}": _renewed(k, "random") for k in (25, 100, 250, 500)},
    **{f"momentum-{k}": _renewed(k, "momentum") for k in (5, 25, 100, 250, 500)},
    **{f"random-{k}-small": _renewed(k, "random", 0.1) for k in (25, 50, 100, 250, 500)},
    **{f"momentum-{k}-small": _renewed(k, "momentum", 0.1) for k in (5, 25, 100, 250, 500)},
    **{f"kept-{k}-small": _renewed(k, "momentum", 0.1, keep=2) for k in (25, 250, 500)},
    **{f"random-{k}-small-kept": _renewed(k, "random", 0.1, keep=2) for k in (250, 500)},
}


def renewal_of(
    method: Method, new_adapters: Callable[[jax.Array], Any], tx: optax.GradientTransformation
) -> Renew:
    """Returns what a method does at its intervals, as a pure function."""
    if method.renewal is not None:
        return functools.partial(renew, pairs=PAIRS, **method.renewal)

    def draw_anew(base: Any, adapters: Any, state: Any, key: jax.Array) -> tuple[Any, Any, Any]:
        # DoRA's direction is merged, and its magnitude goes on.
        is_magnitude = lambda path: path[-1] == jax.tree_util.DictKey("lora_magnitude")
        new = jax.tree.map_with_path(
            lambda path, x, before: before if is_magnitude(path) else x, new_adapters(key), adapters
        )
        fresh = tx.init(new)
        # The schedule goes on. All else starts anew.
        counts = optax.tree.get_all_with_path(state, "count")
        count = next(value for path, value in counts if _is_schedule(path))
        is_schedule = lambda x: isinstance(x, optax.ScaleByScheduleState)
        keep = lambda x: x._replace(count=count) if is_schedule(x) else x
        return merge(base, adapters, PAIRS), new, jax.tree.map(keep, fresh, is_leaf=is_schedule)

    return draw_anew


def _is_schedule(path: Any) -> bool:
    return any(getattr(key, "tuple_name", "") == "ScaleByScheduleState" for key in path)


def warmup_cosine(rate: jax.typing.ArrayLike, steps: int) -> optax.Schedule:
    """Linear to `rate` over the first twentieth of the steps, then a cosine to zero."""
    warmup = max(steps // 20, 1)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.asarray(count)
        cosine = (1 + jnp.cos(jnp.pi * (count - warmup) / (steps - warmup))) / 2
        return jnp.asarray(rate) * jnp.where(count < warmup, (count + 1) / warmup, cosine)

    return schedule
