"""A table of the low-rank pairs of a parameter tree."""

import math

import chex
import jax.numpy as jnp

from loft_jax._factored import factored_width
from loft_jax._moments import packed_size
from loft_jax._pairs import LoraPairs, find_pairs

_SHOWN = 6  # leaves outside pairs that are named


def describe_pairs(params: chex.ArrayTree, pairs: LoraPairs | None = None) -> None:
    """Prints the low-rank pairs found in ``params``, and what their optimizer state takes.

    One line a pair: its path, the shapes of ``U`` and ``V`` (``W = W0 + scale * U V^T``), its batch
    axes, its scale, and the bytes of its state with the calibrated and with the factored second
    moment (basis, first and second moment of both factors, at the default ``mu_dtype``). Then the
    totals, and the first of the leaves that are no factors and get plain AdamW.

    Args:
      params: a pytree of arrays or `jax.ShapeDtypeStruct`.
      pairs: how to find the pairs, as in `loft_adamw`.

    Raises:
      ValueError, TypeError: as `loft_adamw` would, with the paths.

    Example:
      >>> params = {"q": {"lora_a": jnp.ones((64, 4)), "lora_b": jnp.zeros((4, 32))}}
      >>> describe_pairs(params)
      pair         U     V  batch  scale  calibrated  factored
      q/lora_a  64×4  32×4      -      1      6.9 kB    3.8 kB
      pairs: 1 with 384 parameters
      state of the pairs: calibrated 6.9 kB, factored 3.8 kB
    """
    tree = find_pairs(params, pairs)
    header = ("pair", "U", "V", "batch", "scale", "calibrated", "factored")
    rows, totals, parameters = [], [0, 0], 0
    for pair in tree.pairs:
        copies = math.prod(pair.batch)
        dtype = jnp.promote_types(jnp.result_type(tree.leaves[pair.a]), jnp.float32)
        shared = 2 * pair.r * (pair.m + pair.n)
        calibrated = shared + packed_size(pair.r) * (pair.m + pair.n)
        factored = shared + sum(k * factored_width(k, pair.r) for k in (pair.m, pair.n))
        sizes = [count * copies * dtype.itemsize for count in (calibrated, factored)]
        totals = [total + size for total, size in zip(totals, sizes, strict=True)]
        parameters += copies * pair.r * (pair.m + pair.n)
        batch = "×".join(map(str, pair.batch)) or "-"
        shapes = (f"{pair.m}×{pair.r}", f"{pair.n}×{pair.r}")
        path = tree.paths[pair.a]
        rows.append((path, *shapes, batch, f"{pair.scale:g}", *map(_bytes, sizes)))
    widths = [max(len(row[k]) for row in (header, *rows)) for k in range(len(header))]
    for row in (header, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells]))
    inside = {position for pair in tree.pairs for position in (pair.a, pair.b)}
    outside = [k for k in range(len(tree.leaves)) if k not in inside]
    print(f"pairs: {len(rows)} with {parameters:,} parameters")
    if outside:
        # By name: an adapter that was not recognised would be trained by plain AdamW.
        count = sum(math.prod(jnp.shape(tree.leaves[k])) for k in outside)
        names = ", ".join(tree.paths[k] for k in outside[:_SHOWN]) + ", …" * (len(outside) > _SHOWN)
        print(f"outside pairs: {len(outside)} leaves with {count:,} parameters: {names}")
    print(f"state of the pairs: calibrated {_bytes(totals[0])}, factored {_bytes(totals[1])}")


def _bytes(count: int) -> str:
    power = min(max(len(str(count)) - 1, 0) // 3, 4)
    return f"{count / 1000**power:.{1 if power else 0}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
