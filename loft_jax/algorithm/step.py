"""Algorithm 1 of LoFT for one pair of factors, block by block.

Notation of Tastan et al., ICLR 2026: the adapted weight is ``W = W0 + s U V^T`` with ``U``
(``m x r``), ``V`` (``n x r``) and the adapter's scale ``s``; ``G`` is the gradient of ``W``. In the
usual layout ``y = x a b``, ``U`` is ``a`` and ``V`` is ``b^T``. Everything is written for one
factor and its partner: the step of ``V`` is that of ``U`` with the roles exchanged and ``G``
transposed. The moments of a factor are expressed in the basis of its *partner* (`basis.py`).

Batches of layers, chunks, dtypes and meshes are the concern of `loft_jax.execution`, which maps
`calibrate_basis` and `loft_step` over all pairs of a model.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from loft_jax.algorithm.adam import drop_overflowing_rows, first_moment_estimate
from loft_jax.algorithm.basis import Basis, calibration_matrix, scale_gradient, to_factor
from loft_jax.algorithm.pair import Blocks, CalibratedBasis, FactorPair, MomentRule, Moments
from loft_jax.algorithm.sharded_dim import ShardedDim


def loft_step(
    rule: MomentRule,
    blocks: Blocks,
    a_is_active: Bool[Array, ""],
    gradients: FactorPair[Array],
    bases: FactorPair[CalibratedBasis],
    moments: FactorPair[Moments],
    dims: FactorPair[ShardedDim],
    batch_size: int = 1,
) -> tuple[FactorPair[Array], FactorPair[Moments]]:
    """One step of one pair (Algorithm 1, lines 4 to 27).

    Args:
      rule: the optimizer's moments and direction.
      blocks: which building blocks are on.
      a_is_active: whether ``a`` is the active factor, the one that moves; else ``b``.
      gradients: of the factors, ``s G V`` (``m x r``) and ``s G^T U`` (``n x r``).
      bases: of ``s U`` and ``s V`` at this step.
      moments: of both factors after the last step.
      dims: how ``m`` and ``n`` are sharded.
      batch_size: how many pairs a surrounding `jax.vmap` computes at once.

    Returns:
      The directions of both factors, to be subtracted times the learning rate, and their moments.
    """

    def advance(
        gradient: Array, partner: CalibratedBasis, before: Moments, dim: ShardedDim
    ) -> tuple[Array, Moments]:
        basis, calibration, changed = partner
        # Block 2, gradient scaling: h = g (V^T V)^-1 in the basis (eq. 5).
        h = scale_gradient(gradient, basis) if blocks.scale_gradient else gradient
        if rule.b2 is not None:
            h = drop_overflowing_rows(h, dim)
        # Block 3, first moment: M <- b1 M T + (1 - b1) h (eqs. 7, 8).
        mu = before.mu
        if mu is not None and rule.decay is not None:
            carried = mu if calibration is None else mu @ calibration
            mu = rule.decay * carried + rule.weight * h
        # Block 4, second moment: P_i <- b2 T^T P_i T + (1 - b2) h_i h_i^T (eqs. 9, 12).
        nu = rule.second_moment.advance(before.nu, h, calibration, changed, rule.b2, dim)
        return h, Moments(mu, nu)

    def direction(h: Array, partner: CalibratedBasis, new: Moments, dim: ShardedDim) -> Array:
        # Block 5, reconstruction and projection: s dU V^T = D P_V (eq. 13).
        basis, scalars = partner.basis, rule.scalars
        m_hat = h if new.mu is None else first_moment_estimate(new.mu, h, scalars)
        step = rule.second_moment.direction(m_hat, new.nu, basis, scalars, dim, batch_size)
        return to_factor(step, basis)

    h_a, new_a = advance(gradients.a, bases.b, moments.a, dims.a)
    h_b, new_b = advance(gradients.b, bases.a, moments.b, dims.b)
    of_a = lambda: direction(h_a, bases.b, new_a, dims.a)
    of_b = lambda: direction(h_b, bases.a, new_b, dims.b)
    # Block 1, alternation: the moments of both factors advance, the active factor alone moves. The
    # branch saves the m x n work of the other.
    if blocks.alternate:
        directions = jax.lax.cond(
            a_is_active,
            lambda: FactorPair(of_a(), jnp.zeros_like(h_b)),
            lambda: FactorPair(jnp.zeros_like(h_a), of_b()),
        )
    else:
        directions = FactorPair(of_a(), of_b())
    return directions, FactorPair(new_a, new_b)


def calibrate_basis(
    previous: Float[Array, "n r"] | None, basis: Basis, blocks: Blocks
) -> CalibratedBasis:
    """Relates the basis of a factor to the last step's, in which its partner's moments are."""
    if previous is None or not blocks.calibrate:
        return CalibratedBasis(basis)
    changed = basis.dim.max(jnp.any(previous != basis.matrix))
    return CalibratedBasis(basis, calibration_matrix(previous, basis), changed)
