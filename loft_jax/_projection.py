"""Rebuild the full Adam update and project it back: the one loop over ``m x n`` (eq. 13)."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from loft_jax._moments import AdamStep, packed_quadratic
from loft_jax._platform import Platform, platform
from loft_jax._rows import WHOLE, Rows, beside

# Entries of the full update held at once, over a whole batch: large enough for efficient products
# (on a GPU also to hide the launch of the next kernel), small enough for a cache, where there is a
# large one, and for the temporaries not to count.
_BLOCK_ENTRIES: dict[Platform, int] = {"cpu": 2**20, "gpu": 2**23, "tpu": 2**21}
# Columns of a block: a multiple of as many as the axis can be split over, so that each device has
# its part of every block. Fewer would be gathered in every turn of the loop.
_BLOCK_COLUMNS = 256


def project_adam_direction(
    mu: Float[Array, "m r"],
    cross: Float[Array, "m t"],
    q: Float[Array, "n r"],
    step: AdamStep,
    copies: int = 1,
    rows: Rows = WHOLE,
    columns: Rows = WHOLE,
) -> Float[Array, "m r"]:
    """Returns ``D @ q`` for the dense Adam direction ``D``, without ever storing ``D``.

    ``D = (mu q^T / c1) / (sqrt(v / c2) + eps)`` with ``v_ij = q_j^T P_i q_j``. The rows of ``q``,
    which are columns of ``D``, are taken in blocks, and the products ``D_block @ q_block`` summed.

    Blocks are interleaved (block ``b`` holds the rows ``b, b + blocks, ...``): where ``q`` is
    sharded over its rows each device then works on its own part of every block, while contiguous
    blocks would have to be gathered.

    Args:
      mu: first moment in the basis.
      cross: packed cross terms, ``t = r (r + 1) / 2``.
      q: orthonormal basis of the partner factor.
      step: bias corrections, ratio bound and epsilon.
      copies: how many of these a surrounding `jax.vmap` computes at once, to size the blocks.
      rows: how the rows of ``D`` are spread, those of ``mu`` and ``cross``.
      columns: how its columns are, the rows of ``q``.

    Returns:
      ``D @ q``, the update in the basis.

    Source: block 5; epsilon outside the square root, as in AdamW (math: exact AdamW at full rank).

    Example:
      >>> from loft_jax._moments import adam_step
      >>> q = jnp.eye(2)  # full rank: the update is Adam's own, here the sign of the gradient
      >>> h = jnp.array([[3.0, -4.0]])
      >>> cross = jnp.array([[9.0, -12.0, 16.0]])
      >>> step = adam_step(jnp.array(1), 0.0, 0.0, 0.0, jnp.float32)
      >>> project_adam_direction(h, cross, q, step)
      Array([[ 1., -1.]], dtype=float32)
    """
    q, columns = beside(rows, columns, q)
    mu_hat = mu / step.correction1
    cross_hat = cross / step.correction2

    def add_block(total, q_block):
        moment = product(mu_hat, q_block.T)
        # Cancellation can leave a second moment slightly negative, or far too small.
        second = jnp.maximum(product(cross_hat, packed_quadratic(q_block)), 0)
        denominator = jnp.sqrt(second) + step.eps
        ratio = moment / jnp.where(denominator > 0, denominator, 1)
        return total + product(jnp.clip(ratio, -step.bound, step.bound), q_block), None

    blocks = _interleave(
        q, _block_count(q.shape[0], mu.shape[0] * copies, _BLOCK_ENTRIES[platform()])
    )
    # Zeros of both: inside a shard_map the sum differs between devices as its terms do.
    zeros = jnp.zeros_like(mu) + jnp.zeros_like(q[:1])
    if blocks.shape[0] == 1:
        total, _ = add_block(zeros, blocks[0])
    else:
        total, _ = jax.lax.scan(add_block, zeros, blocks)
    return columns.sum(total)


def product(x: Float[Array, "i k"], y: Float[Array, "k j"]) -> Float[Array, "i j"]:
    """A product of the hot loop, ``m x n`` on one side: where all the arithmetic is.

    Three passes of bfloat16 on a TPU, TF32 on a GPU, where everything else is in full float32: with
    the ratio bounded, the errors are far under the noise of gradients (benchmarks/precision.py).
    """
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGH)


def _block_count(n: int, m: int, entries: int) -> int:
    """Returns how many blocks to cut ``n`` rows into, so that they stay where they are sharded.

    The update has ``m`` rows, and a block of it about ``entries`` entries.

    Example:
      >>> _block_count(11008, 4096, 2**21), 11008 // 43
      (43, 256)
      >>> _block_count(4304, 1152, 2**21)  # 16 times a prime: not in blocks of 16 rows
      4
    """
    unit = math.gcd(n, _BLOCK_COLUMNS)
    wanted = min(n // unit, -(-n * m // entries))
    count = next(k for k in range(wanted, n // unit + 1) if (n // unit) % k == 0)
    if n // count >= 64 or count < 2 * wanted:
        return count
    # Such rows are on no large mesh. Blocks may be filled up, and need not be tiny.
    return next((k for k in range(wanted, 2 * wanted) if n % k == 0), wanted)


def _interleave(q: Float[Array, "n r"], blocks: int) -> Float[Array, "blocks block r"]:
    """Cuts rows into interleaved blocks; zero rows fill up, and add nothing to the projection."""
    n, r = q.shape
    padding = -n % blocks
    if padding:
        q = jnp.pad(q, ((0, padding), (0, 0)))
    return q.reshape(-1, blocks, r).swapaxes(0, 1)
