"""The methods of the long runs: an optimizer, what it trains, and what happens at intervals."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from loft_jax import LoraAxes, LoraPairs, baselines, loft_adamw
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
      interval: after how many steps adapters are renewed; None never.
      renewal: options of `loft_jax.adapters.renew`; None draws a new adapter and makes the state
        of its optimizer anew.
    """

    label: str
    optimizer: Callable[[Any], optax.GradientTransformation]
    full: bool = False
    interval: int | None = None
    renewal: dict[str, Any] | None = None


PAIRS = LoraPairs(axes=(("layers/.*", LoraAxes(batch=(0,))),))
_adamw = functools.partial(optax.adamw, weight_decay=0.0)
_loft = functools.partial(loft_adamw, weight_decay=0.0, second_moment="factored", pairs=PAIRS)
_lora_rite = functools.partial(baselines.lora_rite, pairs=PAIRS)


def _renewed(interval: int, size: float = 0.1, **renewal: Any) -> Method:
    renewal["size"] = size
    options = ", ".join(f"{name}={value!r}" for name, value in renewal.items())
    label = f"LoFT, renewed every {interval}: {options}"
    return Method(label=label, optimizer=_loft, interval=interval, renewal=renewal)


def _drawn_anew(interval: int, name: str, optimizer: Any) -> Method:
    label = f"{name}, drawn anew every {interval}, without its moments"
    return Method(label=label, optimizer=optimizer, interval=interval)


METHODS = {
    "full": Method(label="full fine-tuning", optimizer=_adamw, full=True),
    "lora": Method(label="LoRA", optimizer=_adamw),
    "lora-drawn-anew": _drawn_anew(250, "LoRA", _adamw),
    "lora-drawn-anew-25": _drawn_anew(25, "LoRA", _adamw),
    "lora-rite": Method(
        label="LoRA-RITE", optimizer=functools.partial(baselines.lora_rite, pairs=PAIRS)
    ),
    "lora-muon": Method(label="LoRA, Muon on the factors", optimizer=optax.contrib.muon),
    "loft": Method(label="LoFT, factored", optimizer=_loft),
    "loft-drawn-anew": _drawn_anew(250, "LoFT", _loft),
    "loft-drawn-anew-25": _drawn_anew(25, "LoFT", _loft),
    "random-250": _renewed(250, directions="random"),
    "momentum-250": _renewed(250, directions="momentum"),
    "kept-250": _renewed(250, directions="momentum", keep=2),
    "random-25": _renewed(25, directions="random"),
    "momentum-25": _renewed(25, directions="momentum"),
    "stiff-25": _renewed(25, directions="momentum", size=1.0),
    "kept-25": _renewed(25, directions="momentum", keep=2),
    "momentum-5": _renewed(5, directions="momentum"),
    "stiff-5": _renewed(5, directions="momentum", size=1.0),
}


def renewal_of(
    method: Method, new_adapters: Callable[[jax.Array], Any], tx: optax.GradientTransformation
) -> Renew:
    """Returns what a method does at its intervals, as a pure function."""
    if method.renewal is not None:
        return functools.partial(renew, pairs=PAIRS, **method.renewal)

    def draw_anew(base: Any, adapters: Any, state: Any, key: jax.Array) -> tuple[Any, Any, Any]:
        new = new_adapters(key)
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
