"""How libraries name the factors of an adapter, and where the weight is that they adapt.

This table is the one place that knows these names. A library with other names is one more entry
here, or `LoraPairs(rules=...)` of the user.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

_KERNELS = tuple(
    rf"\1{name}" for name in ("kernel", "base/kernel", "base_module/kernel", "w", "base/w")
)


class Naming(NamedTuple):
    """The names of one library.

    Attributes:
      a, b: regular expressions of the whole paths of the two factors. Two leaves are a pair when
        all groups of both matches agree.
      weights: ``(regex of the path of a, templates)`` entries: where the adapted weight may be.
    """

    a: str
    b: str
    weights: tuple[tuple[str, tuple[str, ...]], ...]


NAMINGS: tuple[Naming, ...] = (
    # flax.nnx.LoRA and LoRALinear, linen; qwix and tunix put the weight's name before.
    Naming(
        r"(.*[/_]|)lora_a",
        r"(.*[/_]|)lora_b",
        (
            (r"(.*/|)(\w+)_lora_a", (r"\1\2",)),
            (r"(.*/|)lora/lora_a", _KERNELS),
            (r"(.*/|)lora_a", _KERNELS),
        ),
    ),
    # gemma.peft: bare `a` and `b`, so only under a parent of that name.
    Naming(r"(.*/|)lora/a", r"(.*/|)lora/b", ((r"(.*/|)lora/a", _KERNELS),)),
    # MaxText: `lora_a.kernel` is one key, in older versions `kernel` is a key below `lora_a`.
    Naming(
        r"(.*[/_]|)lora_a([./])kernel",
        r"(.*[/_]|)lora_b([./])kernel",
        ((r"(.*/|)lora_a[./]kernel", _KERNELS),),
    ),
    # Keras 3.
    Naming(
        r"(.*/|)lora_(kernel|embeddings)_a",
        r"(.*/|)lora_(kernel|embeddings)_b",
        ((r"(.*/|)lora_(\w+)_a", (r"\1\2",)),),
    ),
)

DEFAULT_RULES: tuple[tuple[str, str], ...] = tuple((naming.a, naming.b) for naming in NAMINGS)


def weight_paths(path: str) -> tuple[str, ...]:
    """Returns where the weight may be that the factor ``a`` at a path adapts, likely ones first.

    Example:
      >>> weight_paths("layers/0/kernel_lora_a")
      ('layers/0/kernel',)
    """
    found: dict[str, None] = {}  # in order; a layer may itself be called `lora`
    for naming in NAMINGS:
        for regex, templates in naming.weights:
            if match := re.fullmatch(regex, path):
                found |= {match.expand(template): None for template in templates}
    return tuple(found)


def is_factor(path: str, rules: Sequence[tuple[str, str]] = DEFAULT_RULES) -> bool:
    """Whether a leaf at this path is a factor by its name.

    Example:
      >>> is_factor("q/lora_a"), is_factor("q/kernel")
      (True, False)
    """
    return any(re.fullmatch(regex, path) for rule in rules for regex in rule)
