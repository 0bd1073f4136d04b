"""A table of the low-rank pairs of a parameter tree."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp

from loft_jax.algorithm.second_moment import SECOND_MOMENTS
from loft_jax.pairs.find import find_pairs

_SHOWN = 6  # non-LoRA leaves that are named


class PairDescription(NamedTuple):
    """One pair.

    Attributes:
      path: of the factor ``a``.
      m, n, rank: the weight is ``m x n``, its factors ``m x rank`` and ``n x rank``.
      batch: sizes of the batch axes.
      scale: the adapter's own scale.
      state_bytes: of the optimizer state, by second moment: "calibrated" and "factored".
    """

    path: str
    m: int
    n: int
    rank: int
    batch: tuple[int, ...]
    scale: float
    state_bytes: dict[str, int]


class PairsDescription(NamedTuple):
    """The pairs of a tree; `str` of it is the table that `describe_pairs` prints.

    Attributes:
      pairs: one entry a pair.
      others: path and number of parameters of each non-LoRA leaf.
    """

    pairs: tuple[PairDescription, ...]
    others: dict[str, int]

    def __str__(self) -> str:
        header = ("pair", "U", "V", "batch", "scale", "calibrated", "factored")
        rows = [header, *map(_cells, self.pairs)]
        widths = [max(len(row[k]) for row in rows) for k in range(len(header))]
        lines = []
        for row in rows:
            cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            lines.append("  ".join([row[0].ljust(widths[0]), *cells]))
        parameters = sum(
            math.prod(pair.batch) * pair.rank * (pair.m + pair.n) for pair in self.pairs
        )
        lines.append(f"pairs: {len(self.pairs)} with {parameters:,} parameters")
        if self.others:
            # By name: an adapter that was not recognized would be trained by plain AdamW.
            names = ", ".join([*self.others][:_SHOWN]) + ", …" * (len(self.others) > _SHOWN)
            lines.append(
                f"non-LoRA leaves: {len(self.others)} with "
                f"{sum(self.others.values()):,} parameters: {names}"
            )
        totals = (
            f"{kind} {_bytes(sum(pair.state_bytes[kind] for pair in self.pairs))}"
            for kind in ("calibrated", "factored")
        )
        lines.append(f"state of the pairs: {', '.join(totals)}")
        return "\n".join(lines)


def describe_pairs(params: Any, pairs: Any = None) -> PairsDescription:
    """Prints the low-rank pairs found in ``params`` and the size of their state; returns them.

    One line a pair: its path, the shapes of ``U`` and ``V`` (``W = W0 + scale * U V^T``), its batch
    axes, its scale, and the bytes of its state with the calibrated and with the factored second
    moment (basis, first and second moment of both factors, at the default ``mu_dtype``). Then the
    totals, and the first of the leaves that are not factors and get plain AdamW.

    Args:
      params: a pytree of arrays or `jax.ShapeDtypeStruct`.
      pairs: what to look for, as in `loft_adamw`.

    Returns:
      The same as a value.

    Raises:
      ValueError, TypeError: as `loft_adamw` would, with the paths.

    Example:
      >>> params = {"q": {"lora_a": jnp.ones((64, 4)), "lora_b": jnp.zeros((4, 32))}}
      >>> found = describe_pairs(params)
      pair         U     V  batch  scale  calibrated  factored
      q/lora_a  64×4  32×4      -      1      6.9 kB    3.8 kB
      pairs: 1 with 384 parameters
      state of the pairs: calibrated 6.9 kB, factored 3.8 kB
      >>> found.pairs[0].rank
      4
    """
    tree = find_pairs(params, pairs)
    described = []
    for pair in tree.pairs:
        dtype = jnp.promote_types(jnp.result_type(tree.leaves[pair.a]), jnp.float32)
        size = lambda kind, pair=pair: sum(
            rows * (2 * pair.r + SECOND_MOMENTS[kind].width(rows, pair.r))
            for rows in (pair.m, pair.n)
        )
        layer_bytes = math.prod(pair.batch) * dtype.itemsize
        sizes = {kind: size(kind) * layer_bytes for kind in ("calibrated", "factored")}
        path = tree.paths[pair.a]
        described.append(
            PairDescription(path, pair.m, pair.n, pair.r, pair.batch, pair.scale, sizes)
        )
    others = {tree.paths[k]: math.prod(jnp.shape(tree.leaves[k])) for k in tree.others}
    found = PairsDescription(tuple(described), others)
    print(found)
    return found


def _cells(pair: PairDescription) -> tuple[str, ...]:
    batch = "×".join(map(str, pair.batch)) or "-"
    shapes = (f"{pair.m}×{pair.rank}", f"{pair.n}×{pair.rank}")
    sizes = (_bytes(pair.state_bytes[kind]) for kind in ("calibrated", "factored"))
    return (pair.path, *shapes, batch, f"{pair.scale:g}", *sizes)


def _bytes(count: int) -> str:
    power = min(max(len(str(count)) - 1, 0) // 3, 4)
    return f"{count / 1000**power:.{1 if power else 0}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
