"""LoFT for JAX: low-rank adaptation that follows full fine-tuning, as Optax transformations.

`loft_adamw` replaces `optax.adamw` on the adapters of a model. The README shows it with Flax, and
`docs/algorithm.md` the mathematics, equation by function.

The submodules `adapters`, `baselines`, `checkpoint` and `sharding` are imported when they are first
used: the first and the third need Flax and Orbax.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from loft_jax.optimizers.adamw import ScaleByLoftAdamState, loft_adamw, scale_by_loft_adam
from loft_jax.optimizers.balancing import balance_factors
from loft_jax.optimizers.clipping import (
    ClipByProjectedGlobalNormState,
    clip_by_projected_global_norm,
)
from loft_jax.optimizers.muon import ScaleByLoftMuonState, loft_muon, scale_by_loft_muon
from loft_jax.optimizers.sgd import ScaleByLoftMomentumState, loft_sgd, scale_by_loft_momentum
from loft_jax.pairs.axes import LoraAxes
from loft_jax.pairs.describe import PairsDescription, describe_pairs
from loft_jax.pairs.names import DEFAULT_RULES
from loft_jax.pairs.spec import LoraPairs

if TYPE_CHECKING:
    from loft_jax import adapters, baselines, checkpoint, sharding

__version__ = "0.2.0"

__all__ = [
    "DEFAULT_RULES",
    "ClipByProjectedGlobalNormState",
    "LoraAxes",
    "LoraPairs",
    "PairsDescription",
    "ScaleByLoftAdamState",
    "ScaleByLoftMomentumState",
    "ScaleByLoftMuonState",
    "adapters",
    "balance_factors",
    "baselines",
    "checkpoint",
    "clip_by_projected_global_norm",
    "describe_pairs",
    "loft_adamw",
    "loft_muon",
    "loft_sgd",
    "scale_by_loft_adam",
    "scale_by_loft_momentum",
    "scale_by_loft_muon",
    "sharding",
]

_SUBMODULES = ("adapters", "baselines", "checkpoint", "sharding")


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return importlib.import_module(f"loft_jax.{name}")
    raise AttributeError(f"module 'loft_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
