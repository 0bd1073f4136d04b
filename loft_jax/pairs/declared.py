"""The scales of adapters that this process has made, to warn of an optimizer that ignores them.

An optimizer sees arrays, which do not say that the model multiplies their product by
``alpha / rank``. So `add_lora`, `LoraModel` and `qwix_provider` declare the scale of what they
make. Nothing is computed from a declaration: a warning compares it with what the user specified.
"""

import re

_SCALES: dict[str, float] = {}


def declare_scale(path: str, scale: float) -> None:
    """Declares the scale of the adapters whose ``a`` is at a path, a regular expression."""
    _SCALES.pop(path, None)  # the last declaration counts
    _SCALES[path] = scale


def declared_scale(path: str) -> float | None:
    """Returns the scale declared for the adapter whose ``a`` is at ``path``; None if unknown.

    Example:
      >>> declare_scale(r"blocks/\\d+/lora_a", 4.0)
      >>> declared_scale("blocks/3/lora_a"), declared_scale("head/lora_a")
      (4.0, None)
      >>> forget_scales()
    """
    matching = [scale for regex, scale in _SCALES.items() if re.fullmatch(regex, path)]
    return matching[-1] if matching else None


def forget_scales() -> None:
    """Forgets all declarations."""
    _SCALES.clear()
