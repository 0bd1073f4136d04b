"""LoFT for JAX: low-rank adaptation that follows full fine-tuning, as Optax transformations.

`loft_adamw` takes the place of `optax.adamw` on the adapters of a model. See the README for a use
with Flax, and `docs/algorithm.md` for the mathematics, equation by function.
"""

from loft_jax import baselines as baselines
from loft_jax._axes import LoraAxes as LoraAxes
from loft_jax._describe import describe_pairs as describe_pairs
from loft_jax._pairs import DEFAULT_RULES as DEFAULT_RULES
from loft_jax._pairs import LoraPairs as LoraPairs
from loft_jax.transforms._adam_step import ScaleByLoftAdamState as ScaleByLoftAdamState
from loft_jax.transforms._adamw import loft_adamw as loft_adamw
from loft_jax.transforms._adamw import scale_by_loft_adam as scale_by_loft_adam
from loft_jax.transforms._clipping import (
    ClipByProjectedGlobalNormState as ClipByProjectedGlobalNormState,
)
from loft_jax.transforms._clipping import (
    clip_by_projected_global_norm as clip_by_projected_global_norm,
)
from loft_jax.transforms._momentum import ScaleByLoftMomentumState as ScaleByLoftMomentumState
from loft_jax.transforms._momentum import loft_sgd as loft_sgd
from loft_jax.transforms._momentum import scale_by_loft_momentum as scale_by_loft_momentum
from loft_jax.transforms._muon import loft_muon as loft_muon
from loft_jax.transforms._muon import scale_by_loft_muon as scale_by_loft_muon

__version__ = "0.1.0"
