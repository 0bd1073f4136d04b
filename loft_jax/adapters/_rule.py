"""Rules: which layers of a model get an adapter, and with which rank, scale and initialization."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from loft_jax.pairs.axes import LoraAxes
from loft_jax.pairs.spec import LoraPairs

Initializer = Callable[..., Any]

ALL_LINEAR = "all-linear"
HEADS = ("lm_head", "head", "classifier", "score")


def _he_uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Draws in float32 at least: in bfloat16 the mean of JAX's draws is not zero (findings/)."""
    draw = jax.nn.initializers.he_uniform()
    return draw(key, shape, jnp.promote_types(dtype, jnp.float32)).astype(dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraRule:
    """Specifies the adapters of all layers whose path matches.

    An adapted layer computes ``layer(x) + scale * (dropout(x) @ a) @ b``. Pass the rule to an
    optimizer as ``pairs=rule``, so that the optimizer knows the scale and the batch axes.

    Attributes:
      path: the layers to adapt, in one of three forms.

        - A regular expression that matches the layer's whole path, keys joined by ``/``.
        - A list or tuple of names, as PEFT's ``target_modules``: ``["q_proj", "v_proj"]`` matches
          the layers whose path is one of the names or ends with ``/`` and one of them. A name may
          have several keys, joined by ``/`` or ``.``.
        - ``"all-linear"``: every layer that can be adapted, convolutions included, except those
          whose last key is ``lm_head``, ``head``, ``classifier`` or ``score``.
      rank: number of columns of ``a`` and of rows of ``b``.
      alpha: numerator of the scale; None for a scale of 1.
      rslora: whether the scale is ``alpha / sqrt(rank)`` (Kalajdzievski 2023) instead of
        ``alpha / rank``.
      dropout: probability of dropping an input of the adapter. The layer's own input is kept.
      init_a, init_b: initializers, called with a key, a shape and a dtype. One of the two should
        return zeros, so that training starts from the pretrained model.
      dtype: dtype of the factors. The products are computed in the dtype of the layer's output.
      batch: all axes of both factors that enumerate independent adapters, as in `LoraAxes.batch`:
        layers stacked by a scan or a vmap first, then experts. Use (0,) for stacked layers and
        (0, 1) for stacked layers of experts. None reads the axes from the shapes where there is
        only one reading.

    Raises:
      ValueError: the path is an invalid regular expression or an empty list, the rank is below 1,
        alpha is zero or not finite, or dropout is outside [0, 1).

    Example:
      >>> rule = LoraRule(path=r".*/(query|value)", rank=8, alpha=16, dropout=0.05)
      >>> rule.scale
      2.0
      >>> LoraRule(path=["q_proj", "v_proj"], rank=8).matches("layers/0/self_attn/q_proj")
      True
    """

    path: str | Sequence[str]
    rank: int
    alpha: float | int | None = None
    rslora: bool = False
    dropout: float | int = 0.0
    init_a: Initializer = _he_uniform
    init_b: Initializer = jax.nn.initializers.zeros
    dtype: Any = jnp.float32
    batch: tuple[int, ...] | None = None

    def __post_init__(self):
        if isinstance(self.path, str):
            _check_regex(self.path)
        else:
            object.__setattr__(self, "path", _as_names(self.path))  # a tuple hashes
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"LoraRule: rank must be an integer of at least 1, got {self.rank!r}")
        if self.alpha is not None and (not math.isfinite(self.alpha) or self.alpha == 0):
            raise ValueError(f"LoraRule: alpha must be finite and not zero, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f"LoraRule: dropout must be at least 0 and less than 1, got {self.dropout}"
            )
        if self.batch is not None and not isinstance(self.batch, tuple):
            raise ValueError(
                f"LoraRule: batch must be a tuple of axes, such as (0,), got {self.batch!r}"
            )

    @property
    def scale(self) -> float:
        """The factor that multiplies the product ``a @ b``."""
        if self.alpha is None:
            return 1.0
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def regex(self) -> str:
        """A regular expression that matches the whole path of each layer of this rule.

        Example:
          >>> LoraRule(path=["q_proj"], rank=8).regex
          '(?:.*/)?(?:q_proj)'
        """
        if self.path == ALL_LINEAR:
            return rf"(?:.*/)?(?!(?:{'|'.join(HEADS)})(?:/|$))[^/]*"
        if isinstance(self.path, str):
            return self.path
        names = ("[./]".join(map(re.escape, re.split("[./]", name))) for name in self.path)
        return f"(?:.*/)?(?:{'|'.join(names)})"

    def lora_pairs(self) -> LoraPairs:
        """Returns the scale and the batch axes of these adapters; see the function `lora_pairs`.

        Example:
          >>> rule = LoraRule(path="q", rank=8, alpha=16)
          >>> rule.lora_pairs() == lora_pairs(rule)
          True
        """
        return lora_pairs(self)

    def matches(self, path: str) -> bool:
        """Returns whether the layer at this path gets the adapter.

        Args:
          path: keys joined by ``/``; empty for a model that is a single layer.

        Example:
          >>> rule = LoraRule(path="all-linear", rank=8)
          >>> rule.matches("layers/0/mlp/up_proj"), rule.matches("lm_head")
          (True, False)
        """
        return re.fullmatch(self.regex, path) is not None


Rules = LoraRule | Sequence[LoraRule]


def _check_regex(path: str) -> None:
    try:
        re.compile(path)
    except re.error as error:
        raise ValueError(
            f"LoraRule: the path {path!r} is not a valid regular expression: {error}"
        ) from error
    if path.startswith("^") or re.search(r"(?<!\\)\$|\(\?(?![:P])", path):
        raise ValueError(
            f"LoraRule: the path {path!r} must match a layer's whole path and becomes part of a "
            "longer expression. Remove ^, $, lookarounds and flags"
        )


def _as_names(path: Any) -> tuple[str, ...]:
    names = tuple(path) if isinstance(path, (list, tuple)) else ()
    if not names or any(not isinstance(name, str) or not name for name in names):
        raise ValueError(
            "LoraRule: path must be a regular expression, a list of layer names, or "
            f"{ALL_LINEAR!r}, got {path!r}"
        )
    return names


def as_rules(rules: Rules) -> tuple[LoraRule, ...]:
    """Returns one rule or several as a tuple.

    Raises:
      TypeError: an element is not a `LoraRule`, or there is none.
    """
    rules = (rules,) if isinstance(rules, LoraRule) else tuple(rules)
    if not rules or any(not isinstance(rule, LoraRule) for rule in rules):
        raise TypeError(f"rules must be a LoraRule or a sequence of LoraRules, got {rules!r}")
    return rules


def rule_for(path: str, rules: Sequence[LoraRule]) -> LoraRule | None:
    """Returns the first rule that matches a path; None if there is none."""
    return next((rule for rule in rules if rule.matches(path)), None)


def check_all_used(
    rules: Sequence[LoraRule],
    used: Sequence[LoraRule],
    seen: Sequence[str],
    others: Mapping[str, str],
) -> None:
    """Refuses rules that apply to no layer, which are usually misspelled.

    Args:
      rules: all rules.
      used: those that some layer has followed.
      seen: the paths of the layers that can be adapted.
      others: the types of all other modules, by their paths.

    Raises:
      ValueError: a rule was not used. The message lists the layers and suggests a path.
    """
    # Compared by identity: the second of two equal rules is never used.
    unused = [rule for rule in rules if not any(rule is other for other in used)]
    if not unused:
        return
    layers = ", ".join(list(seen)[:12]) + (", ..." if len(seen) > 12 else "")
    raise ValueError(
        f"no layer follows the rule {' and '.join(repr(rule.path) for rule in unused)}. A rule "
        "must match a layer's whole path, and the first rule that matches is used"
        f"{''.join(_suggestion(rule, seen, others) for rule in unused)}. The layers that can be "
        f"adapted: {layers or 'none'}"
    )


def _suggestion(rule: LoraRule, seen: Sequence[str], others: Mapping[str, str]) -> str:
    """Names what the rule matches instead, or the path that was probably meant."""
    path = rule.path
    if path != ALL_LINEAR and (name := next(filter(rule.matches, others), None)) is not None:
        return f". {name or 'The model'} has the type {others[name]}, which cannot be adapted"
    if not isinstance(path, str):
        return ""
    ends = [layer for layer in seen if re.fullmatch(rf".*/(?:{path})", layer)]
    if not ends or any(re.fullmatch(path, layer) for layer in seen):
        return ""
    whole = f".*/{path}" if "|" not in path else f".*/({path})"
    names = f' or path=["{path}"]' if re.fullmatch(r"[\w/]+", path) else ""
    return f'. The paths of {len(ends)} layers end with it: use path=r"{whole}"{names}'


def lora_pairs(rules: Rules) -> LoraPairs:
    """Returns what an optimizer must know of the adapters that these rules make.

    The optimizers do this conversion themselves: ``pairs=rule`` is ``pairs=lora_pairs(rule)``. Call
    the function to look at the result or to change a field with `dataclasses.replace`.

    It applies to the adapters of `add_lora`, `LoraModel` and `qwix_provider`, in trees whose paths
    are those of the adapted model (for linen also with ``params/`` before). In the state of a
    larger model that contains the adapted one, the paths are longer and nothing matches;
    `describe_pairs` shows the scale of each pair.

    Args:
      rules: the rules with which the model was adapted.

    Returns:
      A `LoraPairs` with scales and batch axes.

    Raises:
      TypeError: an element is not a `LoraRule`.

    Example:
      >>> lora_pairs(LoraRule(path="layers/.*", rank=8, alpha=16)).scale
      (('(?:params/)?(?:(?:layers/.*)/)(?:\\\\w+_)?lora_a', 2.0),)
    """
    rules = as_rules(rules)
    paths = [path_of_a(rule) for rule in rules]
    scales = tuple((path, rule.scale) for path, rule in zip(paths, rules, strict=True))
    axes = tuple(
        (path, LoraAxes(batch=rule.batch))
        for path, rule in zip(paths, rules, strict=True)
        if rule.batch is not None
    )
    return LoraPairs(scale=scales, axes=axes or None)


def path_of_a(rule: LoraRule, name: str = r"(?:\w+_)?lora_a") -> str:
    """Returns a regular expression of the paths of the factors ``a`` that a rule makes.

    Args:
      rule: a rule, which may match the root of the model.
      name: a regular expression of the factor's own name; qwix writes ``kernel_lora_a``.
    """
    layer = rf"(?:(?:{rule.regex})/)" + ("?" if rule.matches("") else "")
    return f"(?:params/)?{layer}{name}"
