"""The scales of an adapter's pairs, which its arrays do not contain."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from loft_jax.pairs.declared import declared_scale
from loft_jax.pairs.find import find_pairs
from loft_jax.pairs.spec import as_pairs


def known_scales(adapter: Any, paths: Sequence[str], pairs: Any) -> dict[str, float]:
    """Returns the scales of an adapter's pairs by the paths of their factors ``a``.

    Args:
      adapter: a pytree of the factors.
      paths: of its leaves.
      pairs: as in the optimizers; None for what `add_lora`, `LoraModel` and qwix declared in this
        process.

    Example:
      >>> import jax.numpy as jnp
      >>> from loft_jax import LoraPairs
      >>> adapter = {"lora_a": jnp.ones((3, 1)), "lora_b": jnp.zeros((1, 2))}
      >>> known_scales(adapter, ["lora_a", "lora_b"], LoraPairs(scale=2.0))
      {'lora_a': 2.0}
    """
    if pairs is None:
        found = ((path, declared_scale(path)) for path in paths)
        return {path: float(scale) for path, scale in found if scale is not None}
    spec = dataclasses.replace(as_pairs(pairs), required=False, train_weights=True)
    tree = find_pairs(adapter, spec)
    return {tree.paths[pair.a]: float(pair.scale) for pair in tree.pairs}


def scale_differences(saved: Mapping[str, float], wanted: Mapping[str, float]) -> list[str]:
    """Returns the differences between the recorded scales and this run's, one line each.

    A scale that one of the two does not know is not compared.

    Example:
      >>> scale_differences({"q/lora_a": 2.0, "v/lora_a": 2.0}, {"q/lora_a": 32.0})
      ['adapter: q/lora_a: scale 2 saved, 32 wanted']
    """
    return [
        f"adapter: {path}: scale {saved[path]:g} saved, {wanted[path]:g} wanted"
        for path in saved
        if path in wanted and not math.isclose(saved[path], wanted[path], rel_tol=1e-6)
    ]
