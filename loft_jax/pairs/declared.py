"""What this process knows of the adapters it has made, to check an optimizer's reading of them.

An optimizer sees arrays, which do not say that the model multiplies their product by
``alpha / rank``, nor always which axes are batch axes. So `add_lora`, `LoraModel` and
`qwix_provider` declare the scale and the batch axes of what they make. Nothing is computed from a
declaration: it is compared with what the user specified.
"""

import re
from typing import Any

_SCALES: dict[str, tuple[re.Pattern[str], float]] = {}
_BATCHES: dict[str, tuple[re.Pattern[str], tuple[int, ...]]] = {}


def declare_scale(path: str, scale: float) -> None:
    """Declares the scale of the adapters whose ``a`` is at a path, a regular expression."""
    _declare(_SCALES, path, scale)


def declare_batch(path: str, batch: tuple[int, ...]) -> None:
    """Declares the batch axes of the adapters whose ``a`` is at a path, a regular expression."""
    _declare(_BATCHES, path, batch)


def declared_scale(path: str) -> float | None:
    """Returns the scale declared for the adapter whose ``a`` is at ``path``; None if unknown.

    Example:
      >>> declare_scale(r"blocks/\\d+/lora_a", 4.0)
      >>> declared_scale("blocks/3/lora_a"), declared_scale("head/lora_a")
      (4.0, None)
      >>> forget_scales()
    """
    return _last_match(_SCALES, path)


def declared_batch(path: str) -> tuple[int, ...] | None:
    """Returns the batch axes declared for the adapter whose ``a`` is at ``path``; None if unknown.

    Example:
      >>> declare_batch("blocks/lora_a", (1,))
      >>> declared_batch("blocks/lora_a"), declared_batch("head/lora_a")
      ((1,), None)
      >>> forget_scales()
    """
    return _last_match(_BATCHES, path)


def forget_scales() -> None:
    """Forgets all declarations."""
    _SCALES.clear()
    _BATCHES.clear()


def _declare(known: dict[str, Any], path: str, value: Any) -> None:
    known.pop(path, None)  # the last declaration counts
    # Compiled here: a large model has more paths than the cache of `re` holds.
    known[path] = (re.compile(path), value)


def _last_match(known: dict[str, Any], path: str) -> Any:
    matching = [value for regex, value in known.values() if regex.fullmatch(path)]
    return matching[-1] if matching else None
