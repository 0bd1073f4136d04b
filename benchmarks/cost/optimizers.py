"""The optimizers that several benchmarks of cost measure, by name."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from loft_jax import LoraPairs, loft_adamw, loft_muon

Make = Callable[[Any, LoraPairs], optax.GradientTransformation]
"""(learning rate, pairs) -> the optimizer."""


def adamw(rate: Any, pairs: LoraPairs) -> optax.GradientTransformation:
    """LoRA's optimizer: `optax.adamw` on the factors."""
    return optax.adamw(rate)


def muon(rate: Any, pairs: LoraPairs) -> optax.GradientTransformation:
    """`optax.contrib.muon` on the factors: the last two axes are the matrix."""
    matrices = lambda params: jax.tree.map(
        lambda x: optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), params
    )
    return optax.contrib.muon(rate, muon_weight_dimension_numbers=matrices)


LOFT: dict[str, Make] = {
    "calibrated": lambda rate, pairs: loft_adamw(rate, pairs=pairs),
    "factored": lambda rate, pairs: loft_adamw(rate, pairs=pairs, second_moment="factored"),
    "simple": lambda rate, pairs: loft_adamw(rate, pairs=pairs, second_moment="diagonal"),
    "loft_muon": lambda rate, pairs: loft_muon(rate, pairs=pairs),
}
