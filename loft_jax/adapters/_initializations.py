"""Converts adapters whose initialization changed the base to adapters of the original base.

PiSSA and OLoRA put a part of the weight into the factors and subtract it from the base. The weight
determines that part, so the adapter of the original base is the trained product minus that part.
"""

import numpy as np

from loft_jax.adapters._base_weights import BaseWeights
from loft_jax.adapters._loaded import LoraFactors


def without_initialization(
    module: str, one: LoraFactors, kind: str, base: BaseWeights
) -> LoraFactors:
    """Returns an adapter of twice the rank, for the original base.

    Args:
      module: its name in transformers.
      one: the trained factors.
      kind: "pissa" (Meng et al. 2024) or "olora" (Büyükakyüz 2024), as PEFT initializes them.
      base: the original weights.

    Raises:
      KeyError: the base does not have the module.
      ValueError: the weight of the base has another shape.

    Example:
      >>> weight = np.diag([3.0, 2.0, 1.0])  # rank 1: PiSSA's part is the largest singular value
      >>> b, a = np.sqrt([[3.0], [0.0], [0.0]]), np.sqrt([[3.0, 0.0, 0.0]])
      >>> one = LoraFactors(a.T, b.T, scale=1.0)  # as initialized, so nothing has been learned
      >>> got = without_initialization("up", one, "pissa", BaseWeights({"up.weight": weight}))
      >>> got.rank, float(abs(got.a @ got.b).max()) < 1e-12
      (2, True)
    """
    weight = base[f"{module}.weight"]
    if weight.shape != (one.b.shape[1], one.a.shape[0]):
        raise ValueError(
            f"{module}: the adapter is for a weight (out, in) of {(one.b.shape[1], one.a.shape[0])}"
            f", the base has {weight.shape}. Pass the base model of this adapter"
        )
    left, right = _parts(weight.astype(np.float64), one.rank, kind)
    if kind == "pissa":
        left = left / one.scale  # OLoRA subtracts its factors times the scale
    return one._replace(
        a=np.concatenate([one.a, right.T.astype(one.a.dtype)], axis=1),
        b=np.concatenate([one.b, -left.T.astype(one.b.dtype)], axis=0),
    )


def _parts(weight: np.ndarray, rank: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns (out, r) and (r, in), whose product is the part of the weight."""
    if kind == "olora":
        q, r = np.linalg.qr(weight)
        return q[:, :rank], r[:rank]
    u, s, vh = np.linalg.svd(weight, full_matrices=False)
    root = np.sqrt(s[:rank])
    return u[:, :rank] * root, root[:, None] * vh[:rank]
