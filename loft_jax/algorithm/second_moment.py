"""The second moment of a factor: one protocol, three ways to keep it."""

import dataclasses
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from loft_jax.algorithm.adam import AdamScalars, entrywise_direction
from loft_jax.algorithm.basis import Basis, unseen
from loft_jax.algorithm.calibrated import Calibrated
from loft_jax.algorithm.factored import Factored
from loft_jax.algorithm.sharded_dim import ShardedDim

SecondMomentName = Literal["calibrated", "factored", "diagonal"]


@runtime_checkable
class Direction(Protocol):
    """What turns the moments of a factor ``U`` (``m x r``) into its step; ``V`` has ``n`` rows."""

    def peak_elements(self, m: int, n: int, r: int) -> int:
        """Returns the size of the largest array that a step of all rows would make.

        0 where it is no larger than a factor.
        """
        ...

    def advance(
        self,
        nu: Any,
        h: Float[Array, "m r"],
        calibration: Float[Array, "r r"] | None,
        basis_changed: Bool[Array, ""] | None,
        b2: Any,
        dim: ShardedDim,
    ) -> Any:
        """Calibrates the moment and adds the gradient (block 4).

        Args:
          nu: the moment of the last step, in the last step's basis of the partner; None where
            there is none.
          h: the scaled gradient.
          calibration: the calibration matrix ``T``; None leaves the moment as it is.
          basis_changed: whether the partner's basis differs from the last step's; None if unknown.
          b2: the decay rate.
          dim: how the rows are sharded.
        """
        ...

    def direction(
        self,
        m_hat: Float[Array, "m r"],
        nu: Any,
        basis: Basis,
        scalars: Any,
        dim: ShardedDim,
        batch_size: int,
    ) -> Float[Array, "m r"]:
        """Returns ``D P_V`` in the basis, for Adam's direction ``D`` of the full weight (block 5).

        Args:
          m_hat: the bias-corrected first moment, in the basis.
          nu: the second moment, not yet corrected.
          basis: of the partner.
          scalars: bias corrections, ratio bound and epsilons.
          dim: how the rows are sharded.
          batch_size: how many of these a surrounding `jax.vmap` computes at once.
        """
        ...


@runtime_checkable
class SecondMoment(Direction, Protocol):
    """A way to keep the second moment.

    Its instances are static values: they hash, compare by value and hold no arrays. The state is
    ``nu``, ``(m, width)``; ``dim`` says how its rows are sharded.
    """

    def width(self, m: int, r: int) -> int:
        """Returns the numbers of state per row of the factor."""
        ...

    def carry(
        self,
        nu: Float[Array, "m width"],
        calibration: Float[Array, "r k"],
        known: Float[Array, ""],
        dim: ShardedDim,
    ) -> Float[Array, "m new_width"]:
        """Returns the moment in the basis that a renewal has chosen, of rank ``k``.

        Where that basis lies in the old span it is calibrated as by `advance`. Directions that the
        old span does not have were never seen: they get the mean of its directions, row by row.
        With zeros instead their first steps would be too large, by ``1 / sqrt(1 - b2)``.

        Args:
          nu: the moment in the old basis.
          calibration: ``T``, from the old basis to the new one.
          known: how many directions the old span has, 1 at least.
          dim: how the rows are sharded.
        """
        ...

    def diagonal(self, nu: Float[Array, "m width"], r: int, dim: ShardedDim) -> Float[Array, "m r"]:
        """Returns the second moment of each coordinate in the basis."""
        ...

    def entrywise_bound(self, scalars: AdamScalars) -> jax.Array:
        """Returns the largest ratio that may follow from `diagonal`."""
        ...


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Diagonal:
    """Keeps the squares of the coordinates, ``m x r``: LoFT (simple).

    The squares are not calibrated when the basis changes: nothing less than their cross terms
    could be. So the steps depend on how ``W`` is factored, up to a rotation of the basis. The full
    direction ``D`` does not follow from them, and the ratio is taken entry by entry in the basis.
    """

    def width(self, m: int, r: int) -> int:
        return r

    def peak_elements(self, m: int, n: int, r: int) -> int:
        return 0

    def advance(
        self,
        nu: Float[Array, "m r"],
        h: Float[Array, "m r"],
        calibration: Float[Array, "r r"] | None,
        basis_changed: Bool[Array, ""] | None,
        b2: float | jax.Array,
        dim: ShardedDim,
    ) -> Float[Array, "m r"]:
        return b2 * nu + (1 - b2) * h * h

    def carry(
        self,
        nu: Float[Array, "m r"],
        calibration: Float[Array, "r k"],
        known: Float[Array, ""],
        dim: ShardedDim,
    ) -> Float[Array, "m k"]:
        """The diagonal alone: exact where coordinates stay or exchange their places."""
        mean = jnp.sum(nu, axis=1, keepdims=True) / known
        return nu @ calibration**2 + mean * jnp.diagonal(unseen(calibration))

    def direction(
        self,
        m_hat: Float[Array, "m r"],
        nu: Float[Array, "m r"],
        basis: Basis,
        scalars: AdamScalars,
        dim: ShardedDim,
        batch_size: int,
    ) -> Float[Array, "m r"]:
        return Entrywise(self).direction(m_hat, nu, basis, scalars, dim, batch_size)

    def diagonal(self, nu: Float[Array, "m r"], r: int, dim: ShardedDim) -> Float[Array, "m r"]:
        return nu

    def entrywise_bound(self, scalars: AdamScalars) -> jax.Array:
        # Squares that stay behind when the basis changes have no bound for a calibrated moment.
        # Ten times what Adam's own ratio can reach: training does not, a blow-up would.
        return 10 * scalars.limit


SECOND_MOMENTS: dict[str, SecondMoment] = {
    "calibrated": Calibrated(),
    "factored": Factored(),
    "diagonal": Diagonal(),
}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Entrywise:
    """A second moment whose ratio is taken entry by entry in the basis: the ablation of block 5."""

    kept: SecondMoment

    def width(self, m: int, r: int) -> int:
        return self.kept.width(m, r)

    def peak_elements(self, m: int, n: int, r: int) -> int:
        return m * self.width(m, r)

    def advance(
        self,
        nu: Float[Array, "m width"],
        h: Float[Array, "m r"],
        calibration: Float[Array, "r r"] | None,
        basis_changed: Bool[Array, ""] | None,
        b2: float | jax.Array,
        dim: ShardedDim,
    ) -> Float[Array, "m width"]:
        return self.kept.advance(nu, h, calibration, basis_changed, b2, dim)

    def carry(
        self,
        nu: Float[Array, "m width"],
        calibration: Float[Array, "r k"],
        known: Float[Array, ""],
        dim: ShardedDim,
    ) -> Float[Array, "m new_width"]:
        return self.kept.carry(nu, calibration, known, dim)

    def direction(
        self,
        m_hat: Float[Array, "m r"],
        nu: Float[Array, "m width"],
        basis: Basis,
        scalars: AdamScalars,
        dim: ShardedDim,
        batch_size: int,
    ) -> Float[Array, "m r"]:
        v_hat = self.diagonal(nu, m_hat.shape[1], dim) / scalars.correction2
        return entrywise_direction(m_hat, v_hat, self.entrywise_bound(scalars), scalars)

    def diagonal(self, nu: Float[Array, "m width"], r: int, dim: ShardedDim) -> Float[Array, "m r"]:
        return self.kept.diagonal(nu, r, dim)

    def entrywise_bound(self, scalars: AdamScalars) -> jax.Array:
        return self.kept.entrywise_bound(scalars)
