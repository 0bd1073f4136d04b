"""The calibrated second moment: the paper's, with all cross terms (blocks 4 and 5)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from loft_jax.algorithm.adam import AdamScalars, adam_ratio
from loft_jax.algorithm.basis import Basis, project, unseen
from loft_jax.algorithm.cross_terms import (
    calibrate_cross_terms,
    packed,
    packed_diagonal,
    packed_outer,
    packed_quadratic,
    packed_size,
)
from loft_jax.algorithm.platform import Platform, traced_platform
from loft_jax.algorithm.sharded_dim import ShardedDim, gather_shared_axes

# Entries of the full update held at once, over a whole batch: large enough for efficient products
# (on a GPU also to hide the launch of the next kernel), small enough for a cache, where there is a
# large one, and for the temporaries not to count.
_BLOCK_ENTRIES: dict[Platform, int] = {"cpu": 2**20, "gpu": 2**23, "tpu": 2**21}
# Columns of a block: a multiple of as many devices as may shard the axis, so that each device has
# its part of every block. Smaller blocks would be gathered at every iteration of the loop.
_BLOCK_COLUMNS = 256


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Calibrated:
    """Keeps the packed cross terms ``P_i`` of each row, ``m x t`` with ``t = r (r + 1) / 2``.

    See `SecondMoment` for what each method takes and returns.
    """

    def width(self, m: int, r: int) -> int:
        return packed_size(r)

    def peak_elements(self, m: int, n: int, r: int) -> int:
        return m * max(n, packed_size(r))

    def advance(
        self,
        nu: Float[Array, "m t"],
        h: Float[Array, "m r"],
        calibration: Float[Array, "r r"] | None,
        basis_changed: Bool[Array, ""] | None,
        b2: float | jax.Array,
        dim: ShardedDim,
    ) -> Float[Array, "m t"]:
        """Block 4, eq. (12): ``P_i <- b2 T^T P_i T + (1 - b2) h_i h_i^T``."""

        def accumulate(nu: Float[Array, "m t"]) -> Float[Array, "m t"]:
            return b2 * nu + (1 - b2) * packed_outer(h)

        if calibration is None:
            return accumulate(nu)
        carry = lambda nu: accumulate(calibrate_cross_terms(nu, calibration))
        # T is the identity, up to rounding, for the factor whose partner did not move at the last
        # step. It is by far the most work on moments, so it is worth a branch.
        return (
            carry(nu)
            if basis_changed is None
            else jax.lax.cond(basis_changed, carry, accumulate, nu)
        )

    def carry(
        self,
        nu: Float[Array, "m t"],
        calibration: Float[Array, "r k"],
        known: Float[Array, ""],
        dim: ShardedDim,
    ) -> Float[Array, "m u"]:
        """``P_i <- T^T P_i T + (tr P_i / known) (I - T^T T)``."""
        r = calibration.shape[0]
        mean = jnp.sum(packed_diagonal(nu, r), axis=1, keepdims=True) / known
        return calibrate_cross_terms(nu, calibration) + mean * packed(unseen(calibration))

    def direction(
        self,
        m_hat: Float[Array, "m r"],
        nu: Float[Array, "m t"],
        basis: Basis,
        scalars: AdamScalars,
        dim: ShardedDim,
        batch_size: int,
    ) -> Float[Array, "m r"]:
        """Block 5, eq. (13): ``D P_V`` for the dense Adam direction ``D``, which is never stored.

        ``D_ij = m_hat_i . q_j / (sqrt(q_j^T P_i q_j / (1 - b2^k)) + eps)``; epsilon is outside the
        square root, as in AdamW. The rows of ``F``, columns of ``D``, are taken in blocks, and the
        products ``D_block F_block`` added up.

        Blocks are interleaved (block ``b`` holds the rows ``b, b + blocks, ...``): where ``F`` is
        sharded over its rows each device then works on its own part of every block, while
        contiguous blocks would have to be gathered.
        """
        q, columns = gather_shared_axes(dim, basis.dim, basis.matrix)
        nu, weight = separate_rank_one(nu, m_hat, scalars)

        def add_block(b: int | jax.Array, total: Float[Array, "m r"]) -> Float[Array, "m r"]:
            q_block = jax.lax.dynamic_index_in_dim(blocks, b, 1, keepdims=False)
            moment = product(m_hat, q_block.T)
            # The bias correction of nu goes to the smaller of the two matrices.
            v_hat = product(nu, packed_quadratic(q_block) / scalars.correction2)
            v_hat += weight * moment * moment
            ratio = adam_ratio(moment, v_hat, scalars)
            return total + product(jnp.clip(ratio, -scalars.bound, scalars.bound), q_block)

        entries = _BLOCK_ENTRIES[traced_platform()]
        blocks = interleaved_blocks(q, num_blocks(q.shape[0], m_hat.shape[0] * batch_size, entries))
        # Zeros of both: inside a shard_map the sum differs between devices as its terms do.
        zeros = jnp.zeros_like(m_hat) + jnp.zeros_like(q[:1])
        if blocks.shape[1] == 1:
            total = add_block(0, zeros)
        else:
            total = jax.lax.fori_loop(0, blocks.shape[1], add_block, zeros)
        return project(columns.sum(total), basis)

    def diagonal(self, nu: Float[Array, "m t"], r: int, dim: ShardedDim) -> Float[Array, "m r"]:
        return packed_diagonal(nu, r)

    def entrywise_bound(self, scalars: AdamScalars) -> jax.Array:
        return scalars.bound


def separate_rank_one(
    nu: Float[Array, "m t"], m_hat: Float[Array, "m r"], scalars: AdamScalars
) -> tuple[Float[Array, "m t"], Float[Array, "m 1"]]:
    """Returns cross terms without the rows of rank one, and the weights of ``m_hat`` in these.

    After its first gradient ``h_i``, ``P_i`` is a multiple of ``h_i h_i^T`` and ``m_hat_i`` one of
    ``h_i``, so ``q_j^T P_i q_j`` is ``(m_hat_i . q_j)^2`` times ``tr P_i / |m_hat_i|^2``. The sum
    over cross terms has an error of ``eps |h_i|^2 |q_j|^2``. Where ``h_i . q_j`` is below
    ``sqrt(eps)`` of these lengths, about one entry in a thousand in float32, it is rounding, and
    with it Adam's ratio: another order of the sums changed rows by up to 4 %. The square of the
    moment has no such error. Rows of a higher rank need none: two gradients that both vanish there.

    Args:
      nu: packed cross terms ``P_i``.
      m_hat: the corrected first moments.
      scalars: of this step.

    Returns:
      ``nu`` with zeros in the rows of rank one, and the weights, zero in the others.

    Example:
      >>> from loft_jax.algorithm.adam import adam_scalars
      >>> scalars = adam_scalars(jnp.array(1), 0.9, 0.999, 1e-8, jnp.float32)
      >>> h = jnp.array([[3.0, 4.0], [1.0, 0.0]])
      >>> nu = packed_outer(h).at[1].add(jnp.array([0.0, 0.0, 1.0]))  # the second has rank two
      >>> left, weight = separate_rank_one(1e-3 * nu, h, scalars)
      >>> (left[0] == 0).all().tolist(), weight.round(3).tolist()
      (True, [[1.0], [0.0]])
    """
    eps = float(jnp.finfo(nu.dtype).eps)
    row, col = np.triu_indices(m_hat.shape[1])
    times = jnp.asarray(np.where(row == col, 1.0, 2.0), nu.dtype)
    trace = jnp.sum(packed_diagonal(nu, m_hat.shape[1]), axis=1, keepdims=True)
    size = jnp.linalg.norm(m_hat, axis=1, keepdims=True)
    # u^T P u is tr P for a unit vector u if and only if P is a multiple of u u^T.
    unit = m_hat / jnp.where(size > 0, size, 1)
    along = jnp.sum(nu * packed_outer(unit) * times, axis=1, keepdims=True)
    rank_one = (trace > 0) & (size > 0) & (along >= (1 - 16 * eps) * trace)
    # The root first: the square of a tiny moment would underflow.
    root = jnp.sqrt(trace / scalars.correction2) / jnp.where(rank_one, size, 1)
    return jnp.where(rank_one, 0, nu), jnp.where(rank_one, root * root, 0)


def product(x: Float[Array, "i k"], y: Float[Array, "k j"]) -> Float[Array, "i j"]:
    """A product of the hot loop, ``m x n`` on one side: where all the arithmetic is.

    Three passes of bfloat16 on a TPU, TF32 on a GPU, where everything else is in full float32: with
    the ratio bounded, the errors are far below the noise of gradients (docs/cost.md).
    """
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGH)


def num_blocks(n: int, m: int, entries: int) -> int:
    """Returns into how many blocks to cut ``n`` rows, so that they stay where they are sharded.

    The update has ``m`` rows, and a block of it about ``entries`` entries.

    Example:
      >>> num_blocks(11008, 4096, 2**21), 11008 // 43
      (43, 256)
      >>> num_blocks(4304, 1152, 2**21)  # 16 times a prime: not in blocks of 16 rows
      4
    """
    unit = math.gcd(n, _BLOCK_COLUMNS)
    wanted = min(n // unit, -(-n * m // entries))
    count = next(k for k in range(wanted, n // unit + 1) if (n // unit) % k == 0)
    if n // count >= 64 or count < 2 * wanted:
        return count
    # Such rows are on no large mesh. Blocks may be padded, and need not be tiny.
    return next((k for k in range(wanted, 2 * wanted) if n % k == 0), wanted)


def interleaved_blocks(q: Float[Array, "n r"], blocks: int) -> Float[Array, "block blocks r"]:
    """Cuts rows into interleaved blocks; zero rows pad them, and add nothing to the projection."""
    n, r = q.shape
    padding = -n % blocks
    if padding:
        q = jnp.pad(q, ((0, padding), (0, 0)))
    return q.reshape(-1, blocks, r)
