"""`LoraPairs`: what a user specifies about the pairs of a tree, as one frozen value."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from jax.sharding import PartitionSpec

from loft_jax.pairs.axes import LoraAxes
from loft_jax.pairs.names import DEFAULT_RULES

PerPair = Any
"""A value for all pairs, ``(regex, value)`` entries, a pytree or a callable of the parameters."""


@runtime_checkable
class PairsSource(Protocol):
    """Anything that knows the pairs it makes, such as `loft_jax.adapters.LoraRule`."""

    def lora_pairs(self) -> "LoraPairs": ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraPairs:
    """Specifies which parameters are low-rank pairs, how to read their axes, and their scale.

    It is a frozen value, so that it can be an argument of an optimizer under
    `optax.inject_hyperparams`, which would take a function for a schedule.

    Attributes:
      rules: pairs of regular expressions, for ``a`` and for ``b``, matched against whole paths
        (keys joined by ``/``). Two leaves are a pair when all groups of both matches agree.
      axes: a `LoraAxes` for all pairs, or ``(regex, LoraAxes)`` entries of which the first that
        matches the path of ``a`` counts. None reads them from the shapes: two-dimensional factors,
        any number of equal leading batch axes, or one factor with several row axes; otherwise an
        error asks for them. Also a pytree or a callable, see below.
      scale: the adapter's own factor, ``alpha / r`` (``alpha / sqrt(r)`` for rsLoRA): one number
        for all pairs, or ``(regex, number)`` entries as for ``axes`` (1 where none matches).
        None is 1, with a warning for adapters that are known to be scaled otherwise.
        `describe_pairs` shows what each pair got. Also a pytree or a callable, see below.
      required: False accepts a tree without pairs, whose leaves all get the update of
        non-LoRA parameters (for `loft_adamw` AdamW's).
      train_weights: True accepts a weight next to its own adapter and trains both.
      specs: for an update inside `jax.shard_map` how that shards the leaves, ``(regex, spec)``
        entries as for ``axes``, matched against each leaf's own path;
        `loft_jax.sharding.shard_map_pairs` makes them from the ``in_specs``. Not used elsewhere.

    As for Optax's dimension numbers, ``axes`` and ``scale`` may also be a pytree with the structure
    of the parameters, whose values at the factors ``a`` count, or a callable that takes the
    parameters and returns one of these forms. Prefixes of the structure are allowed. A tree with a
    list or a tuple at its root must come from a callable.

    Raises:
      ValueError: a rule is not a pair of valid expressions, or a scale is zero or not finite.
      TypeError: a field is a list or an array; use tuples.

    Example:
      >>> LoraPairs(scale=2.0).scale
      2.0
      >>> by_layer = LoraPairs(scale=((".*attention.*", 2.0), (".*", 0.5)))
      >>> scanned = LoraPairs(axes=LoraAxes(batch=(1,)))
      >>> other_names = LoraPairs(rules=((r"(.*)/down", r"(.*)/up"),))
      >>> as_a_tree = LoraPairs(scale={"q": 2.0, "v": 0.5})
    """

    rules: tuple[tuple[str, str], ...] = DEFAULT_RULES
    axes: LoraAxes | tuple[tuple[str, LoraAxes], ...] | Callable[[Any], Any] | Any | None = None
    scale: float | tuple[tuple[str, float], ...] | Callable[[Any], Any] | Any | None = None
    required: bool = True
    train_weights: bool = False
    specs: tuple[tuple[str, PartitionSpec], ...] = ()

    def __post_init__(self):
        fields = {"rules": self.rules, "specs": self.specs}
        for name, value in {"axes": self.axes, "scale": self.scale}.items():
            if not is_per_tree(value):
                fields[name] = entries(value)
        try:
            hash(tuple(fields.values()))
        except TypeError as error:
            raise TypeError(
                f"LoraPairs takes tuples and numbers, not lists or arrays: {self}"
            ) from error
        for name, of_field in fields.items():
            if any(not isinstance(entry, tuple) or len(entry) != 2 for entry in of_field):
                raise ValueError(
                    f"LoraPairs: {name} is a tuple of pairs, each with a regex first (mind the "
                    f"comma after a single pair), got {of_field!r}"
                )
        patterns = [pattern for rule in self.rules for pattern in rule]
        patterns += [regex for name in fields if name != "rules" for regex, _ in fields[name]]
        for pattern in patterns:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ValueError(
                    f"LoraPairs: {pattern!r} is not a regular expression: {error}"
                ) from error
        for _, scale in fields.get("scale", ()):
            check_scale(scale)

    def __hash__(self) -> int:
        # Trees of values do not hash. Equal values have equal rules.
        return hash((self.rules, self.required, self.train_weights, self.specs))


def as_pairs(pairs: Any) -> LoraPairs:
    """Returns the `LoraPairs` of an optimizer's ``pairs`` argument.

    Args:
      pairs: None for the defaults, a `LoraPairs`, a `LoraRule` or a sequence of them.

    Raises:
      TypeError: anything else.
    """
    if pairs is None:
        return LoraPairs()
    if isinstance(pairs, LoraPairs):
        return pairs
    sources = pairs if isinstance(pairs, (list, tuple)) else [pairs]
    if not sources or not all(
        isinstance(source, PairsSource) and not isinstance(source, type) for source in sources
    ):
        raise TypeError(
            "pairs= takes a LoraPairs, a LoraRule or a sequence of LoraRules (those that the model "
            "was adapted with), or None for adapters with standard names and scale 1; got "
            f"{pairs!r}"
        )
    return join_pairs([source.lora_pairs() for source in sources])


def join_pairs(several: list[LoraPairs]) -> LoraPairs:
    """Returns the entries of several `LoraPairs`, one after another; the rules are the first's."""
    first, *_ = several
    axes = tuple(entry for pairs in several for entry in entries(pairs.axes))
    scale = tuple(entry for pairs in several for entry in entries(pairs.scale))
    return dataclasses.replace(first, axes=axes or None, scale=scale or None)


def is_per_tree(value: PerPair) -> bool:
    """Whether a value is given by a pytree or a callable of the parameters."""
    return callable(value) or isinstance(value, dict) or hasattr(value, "keys")


def is_entries(value: PerPair) -> bool:
    """Whether a value is given by ``(regex, value)`` entries."""
    is_entry = lambda x: type(x) is tuple and len(x) == 2 and isinstance(x[0], str)
    return isinstance(value, tuple) and all(map(is_entry, value))


def entries(value: PerPair) -> tuple[tuple[str, Any], ...]:
    """Returns ``(regex, value)`` entries."""
    if value is None:
        return ()
    return value if isinstance(value, tuple) else ((r"(?s).*", value),)


def first_match(value: PerPair, path: str) -> Any | None:
    """Returns the value of the first entry that matches a path."""
    return next((v for regex, v in entries(value) if re.fullmatch(regex, path)), None)


def check_scale(scale: Any) -> float:
    """Returns the scale as Python's number; a NumPy number would promote what it multiplies.

    Raises:
      ValueError: it is zero or not finite.
      TypeError: it is not a number.
    """
    if not isinstance(scale, (int, float)) and not hasattr(scale, "item"):
        raise TypeError(f"LoraPairs: a scale is a number, got {scale!r}")
    # At once: while an init is traced even the comparison of a known array would be.
    number = float(scale)
    if not math.isfinite(number) or number == 0:
        raise ValueError(f"LoraPairs: a scale must be finite and not zero, got {scale}")
    return number
