"""Where the base weight of an adapter lies, by the names that libraries give the two."""

import re

_NAMES_OF_A = (
    # What precedes the factor's name is the layer; what the name itself holds is the weight.
    r"(?P<layer>.*/|)(?P<weight>\w+)_lora_a",  # qwix, tunix
    r"(?P<layer>.*/|)lora_(?P<weight>\w+)_a",  # Keras 3
    r"(?P<layer>.*/|)lora_a/kernel",  # MaxText's older layout
    r"(?P<layer>.*/|)lora/(?:lora_a|a)",  # nnx.LoRALinear, gemma.peft
    r"(?P<layer>.*/|)(?:lora_a|a)",  # nnx.LoRA, linen
)
_WEIGHTS = ("kernel", "base/kernel", "base_module/kernel", "w", "base/w")


def weight_paths(path: str) -> tuple[str, ...]:
    """Where the weight may lie to which the factor at a path belongs.

    Example:
      >>> weight_paths("layers/0/kernel_lora_a")
      ('layers/0/kernel',)
    """
    candidates: dict[str, None] = {}  # in order; a layer may itself be called `lora`
    for regex in _NAMES_OF_A:
        if match := re.fullmatch(regex, path):
            found = match.groupdict()
            names = (found["weight"],) if found.get("weight") else _WEIGHTS
            candidates |= {found["layer"] + name: None for name in names}
    return tuple(candidates)
