"""Steps without a second moment: follow the calibrated momentum, or orthogonalize it."""

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from loft_jax.algorithm.adam import as_scalar
from loft_jax.algorithm.basis import Basis
from loft_jax.algorithm.newton_schulz import Coefficients, newton_schulz
from loft_jax.algorithm.sharded_dim import ShardedDim


class FollowMoment(NamedTuple):
    """LoFT-SGD: the full weight moves along the calibrated momentum, ``M Q^T``."""

    def peak_elements(self, m: int, n: int, r: int) -> int:
        return 0

    def advance(
        self, nu: None, h: Any, calibration: Any, basis_changed: Any, b2: Any, dim: Any
    ) -> None:
        return None

    def direction(
        self,
        m_hat: Float[Array, "m r"],
        nu: None,
        basis: Basis,
        scalars: Any,
        dim: ShardedDim,
        batch_size: int,
    ) -> Float[Array, "m r"]:
        return m_hat


class OrthogonalizeMoment(NamedTuple):
    """LoFT-Muon: the full weight moves along ``NewtonSchulz(M Q^T) = NewtonSchulz(M) Q^T``.

    Attributes:
      steps, coeffs, eps: see `newton_schulz`.
      consistent_rms: None for the orthogonalized moment as it is; a number scales it by
        ``sqrt(max(m, n))`` times that number.
    """

    steps: int | jax.Array
    coeffs: Coefficients
    eps: float | jax.Array
    consistent_rms: float | jax.Array | None

    def peak_elements(self, m: int, n: int, r: int) -> int:
        return 0

    def advance(
        self, nu: None, h: Any, calibration: Any, basis_changed: Any, b2: Any, dim: Any
    ) -> None:
        return None

    def direction(
        self,
        m_hat: Float[Array, "m r"],
        nu: None,
        basis: Basis,
        scalars: Any,
        dim: ShardedDim,
        batch_size: int,
    ) -> Float[Array, "m r"]:
        """Algorithm 5, lines 17 and 21."""
        step = newton_schulz(m_hat, self.steps, self.coeffs, self.eps, dim)
        if self.consistent_rms is None:
            return step
        longer = max(dim.size(m_hat.shape[0]), basis.dim.size(basis.matrix.shape[0]))
        return step * (longer**0.5 * as_scalar(self.consistent_rms, step.dtype))
