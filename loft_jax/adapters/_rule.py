"""Which layers of a model get an adapter, and of what kind."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from loft_jax.pairs.axes import LoraAxes
from loft_jax.pairs.spec import LoraPairs

Initializer = Callable[..., Any]

_HE_UNIFORM = jax.nn.initializers.he_uniform()


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraRule:
    """Adapters of one kind, for all layers whose path matches.

    An adapted layer computes ``layer(x) + scale * (dropout(x) @ a) @ b``.

    Attributes:
      path: a regular expression that the layer's whole path matches, keys joined by ``/``.
      rank: columns of ``a`` and rows of ``b``.
      alpha: the numerator of the scale; None for a scale of 1.
      rslora: the scale is ``alpha / sqrt(rank)`` (Kalajdzievski 2023), and not ``alpha / rank``.
      dropout: probability with which an input of the adapter (not of the layer) is dropped.
      init_a, init_b: initializers, called with a key, a shape and a dtype. One of the two is zero
        as a rule, so that training starts from the pretrained model.
      dtype: that of the factors. The products are computed in the dtype of the layer's output.
      batch: all axes of both factors that enumerate independent adapters, as `LoraAxes.batch`:
        layers stacked by a scan or a vmap, then experts: (0,) for stacked layers, (0, 1) for
        stacked layers of experts. None finds them by shape where there is no doubt.

    Raises:
      ValueError: a path that is no regular expression, a rank below 1, an alpha that is zero or
        not finite, a dropout outside [0, 1).

    Example:
      >>> rule = LoraRule(path=r".*/(query|value)", rank=8, alpha=16, dropout=0.05)
      >>> rule.scale
      2.0
    """

    path: str
    rank: int
    alpha: float | int | None = None
    rslora: bool = False
    dropout: float | int = 0.0
    init_a: Initializer = _HE_UNIFORM
    init_b: Initializer = jax.nn.initializers.zeros
    dtype: Any = jnp.float32
    batch: tuple[int, ...] | None = None

    def __post_init__(self):
        try:
            re.compile(self.path)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"LoraRule: {self.path!r} is no regular expression: {error}"
            ) from error
        if self.path.startswith("^") or re.search(r"(?<!\\)\$|\(\?(?![:P])", self.path):
            raise ValueError(
                f"LoraRule: the path {self.path!r} is matched whole and is a part of the factors' "
                "paths: leave out ^, $, lookarounds and flags"
            )
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"LoraRule: rank is a whole number from 1 on, got {self.rank!r}")
        if self.alpha is not None and (not math.isfinite(self.alpha) or self.alpha == 0):
            raise ValueError(f"LoraRule: alpha must be finite and not zero, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoraRule: dropout is at least 0 and below 1, got {self.dropout}")
        if self.batch is not None and not isinstance(self.batch, tuple):
            raise ValueError(f"LoraRule: batch is a tuple of axes, (0,) for one: {self.batch!r}")

    @property
    def scale(self) -> float:
        """The factor of the product ``a @ b``."""
        if self.alpha is None:
            return 1.0
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def lora_pairs(self) -> LoraPairs:
        """What an optimizer must know of these adapters; see the function `lora_pairs`."""
        return lora_pairs(self)

    def matches(self, path: str) -> bool:
        """Whether a layer at this path gets the adapter."""
        return re.fullmatch(self.path, path) is not None


Rules = LoraRule | Sequence[LoraRule]


def as_rules(rules: Rules) -> tuple[LoraRule, ...]:
    """One rule or several, as a tuple."""
    rules = (rules,) if isinstance(rules, LoraRule) else tuple(rules)
    if not rules or any(not isinstance(rule, LoraRule) for rule in rules):
        raise TypeError(f"rules are one LoraRule or a sequence of them, got {rules!r}")
    return rules


def rule_for(path: str, rules: Sequence[LoraRule]) -> LoraRule | None:
    """The first rule that matches."""
    return next((rule for rule in rules if rule.matches(path)), None)


def check_all_used(rules: Sequence[LoraRule], used: Sequence[LoraRule], seen: Sequence[str]):
    """Complains of a rule that no layer has followed: a typing error would train nothing.

    Raises:
      ValueError: naming the rules, and the layers that could have been adapted.
    """
    # By identity: two equal rules are one too many as well.
    idle = [rule.path for rule in rules if not any(rule is other for other in used)]
    if idle:
        layers = ", ".join(list(seen)[:12]) + (", ..." if len(seen) > 12 else "")
        raise ValueError(
            f"no layer follows the rule {' and '.join(map(repr, idle))}, which must match a whole "
            f"path and not stand behind a wider rule. The layers that can be adapted: "
            f"{layers or 'none'}"
        )


def lora_pairs(rules: Rules) -> LoraPairs:
    """What an optimizer must know of the adapters that these rules make: scales and batch axes.

    Holds for the adapters of `add_lora`, `LoraModel` and `qwix_provider`, in trees whose paths are
    those that the rules matched: ``params["params"]`` and not the variables, the state of the
    adapted model and not of one around it. Elsewhere the scale would be 1: `describe_pairs` shows
    what each pair got.

    Args:
      rules: those the model was adapted with.

    Returns:
      A value for the `pairs` argument of the optimizers.

    Example:
      >>> lora_pairs(LoraRule(path="layers/.*", rank=8, alpha=16)).scale
      (('(?:(?:layers/.*)/)(?:\\\\w+_)?lora_a', 2.0),)
    """
    rules = as_rules(rules)
    paths = [_path_of_a(rule) for rule in rules]
    scales = tuple((path, rule.scale) for path, rule in zip(paths, rules, strict=True))
    axes = tuple(
        (path, LoraAxes(batch=rule.batch))
        for path, rule in zip(paths, rules, strict=True)
        if rule.batch is not None
    )
    return LoraPairs(scale=scales, axes=axes or None)


def _path_of_a(rule: LoraRule) -> str:
    """The paths of `a` under the layers that follow a rule, one of which may be the root."""
    layer = rf"(?:(?:{rule.path})/)" + ("?" if rule.matches("") else "")
    return layer + r"(?:\w+_)?lora_a"  # `kernel_lora_a` where qwix made it
