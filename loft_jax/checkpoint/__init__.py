"""Checkpoints of a LoRA or LoFT fine-tuning run, without the frozen base weights.

A layer over Orbax. Only this package imports Orbax; `import loft_jax`
does not. `docs/checkpoints.md` lists the guarantees and the behavior under each fault.
"""

from loft_jax.checkpoint._base import BaseReference as BaseReference
from loft_jax.checkpoint._base import base_reference as base_reference
from loft_jax.checkpoint._checkpoints import Checkpoints as Checkpoints
from loft_jax.checkpoint._checkpoints import Restored as Restored
from loft_jax.checkpoint._digest import digests as digests
from loft_jax.checkpoint._errors import CheckpointDamaged as CheckpointDamaged
from loft_jax.checkpoint._errors import CheckpointError as CheckpointError
from loft_jax.checkpoint._errors import CheckpointMismatch as CheckpointMismatch
from loft_jax.checkpoint._errors import DamagedCheckpointWarning as DamagedCheckpointWarning
from loft_jax.checkpoint._errors import (
    UndeletedCheckpointWarning as UndeletedCheckpointWarning,
)
from loft_jax.checkpoint._preemption import Preemption as Preemption
