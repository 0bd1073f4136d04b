"""One scale and one rank for all modules, for formats that have a single field for each."""

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from loft_jax.adapters._loaded import LoraFactors


def fold_scales(factors: Mapping[str, LoraFactors], scale: float = 1.0) -> dict[str, LoraFactors]:
    """Gives all adapters the same scale. The rest of each one's scale is multiplied into ``b``.

    Args:
      factors: adapters by module.
      scale: the common scale, not zero.

    Returns:
      Adapters with the same products. ``b`` keeps its dtype and is rounded once; for powers of two
      nothing is rounded.

    Example:
      >>> one = LoraFactors(np.ones((6, 3)), np.ones((3, 4)), scale=2.0)
      >>> folded = fold_scales({"up": one})["up"]
      >>> folded.scale, folded.b[0, 0].item()
      (1.0, 2.0)
    """
    return {module: _fold(one, scale) for module, one in factors.items()}


def _fold(one: LoraFactors, scale: float) -> LoraFactors:
    if one.scale == scale:
        return one
    wide = one.b.astype(np.float64) * (one.scale / scale)
    return one._replace(b=wide.astype(one.b.dtype), scale=scale)


def pad_ranks(factors: Mapping[str, LoraFactors]) -> dict[str, LoraFactors]:
    """Gives all adapters the largest rank, by columns of ``a`` and rows of ``b`` that are zero.

    Returns:
      Adapters with the same products and scales.

    Example:
      >>> one = LoraFactors(np.ones((6, 3)), np.ones((3, 4)), scale=2.0)
      >>> two = LoraFactors(np.ones((6, 5)), np.ones((5, 4)), scale=2.0)
      >>> padded = pad_ranks({"up": one, "down": two})["up"]
      >>> padded.a.shape, padded.b.shape, padded.b[3:].any().item()
      ((6, 5), (5, 4), False)
    """
    rank = max(one.rank for one in factors.values())
    return {module: _pad(one, rank - one.rank) for module, one in factors.items()}


def _pad(one: LoraFactors, columns: int) -> LoraFactors:
    if not columns:
        return one
    a = np.pad(one.a, [(0, 0)] * (one.a.ndim - 1) + [(0, columns)])
    b = np.pad(one.b, [(0, 0)] * (one.b.ndim - 2) + [(0, columns), (0, 0)])
    return one._replace(a=a, b=b)


def most_common(values: Iterable[float]) -> float:
    """Returns the most frequent value, the first of several.

    Example:
      >>> most_common([2.0, 1.0, 1.0])
      1.0
    """
    return Counter(values).most_common(1)[0][0]
