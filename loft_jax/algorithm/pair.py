"""What one step of one pair takes and returns."""

import dataclasses
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

import jax
from jaxtyping import Array, Bool, Float

from loft_jax.algorithm.adam import AdamScalars, MomentumScalars
from loft_jax.algorithm.basis import Basis
from loft_jax.algorithm.second_moment import Direction

T = TypeVar("T")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FactorPair(Generic[T]):
    """Something of each factor of a pair: of ``a`` (``U``), and of ``b`` (``V``)."""

    a: T
    b: T

    def __iter__(self) -> Iterator[T]:
        return iter((self.a, self.b))


class Moments(NamedTuple):
    """First and second moment of a factor, in the basis of its partner; None where not kept."""

    mu: Float[Array, "m r"] | None = None
    nu: Float[Array, "m width"] | None = None


class CalibratedBasis(NamedTuple):
    """The basis of a factor, and how its partner's moments come into it from the last one.

    Attributes:
      basis: of the factor at this step.
      calibration: ``T``, ``(r, r)``; None leaves the moments as they are.
      changed: ``()``, whether the basis differs from the last step's at all; None if unknown.
    """

    basis: Basis
    calibration: Float[Array, "r r"] | None = None
    changed: Bool[Array, ""] | None = None


class MomentRule(NamedTuple):
    """What an optimizer makes of the scaled gradients of one step.

    Attributes:
      decay, weight: of the first moment, ``M <- decay M T + weight h``; no decay keeps no moment.
      b2: the decay rate of the second moment.
      scalars: bias corrections and epsilons of this step.
      second_moment: how the second moment is kept and the step formed.
    """

    decay: float | jax.Array | None
    weight: float | jax.Array
    b2: float | jax.Array | None
    scalars: AdamScalars | MomentumScalars
    second_moment: Direction


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Blocks:
    """Which of the paper's building blocks are on; the others are its ablations. And the precision.

    Attributes:
      alternate: block 1; off, both factors move from the same point.
      scale_gradient: block 2; off, the factor's own gradient replaces the projected one.
      calibrate: blocks 3 and 4; off, moments stay as they are when the partner moves.
      reconstruct: block 5; off, Adam's ratio is taken entry by entry in the basis.
      precision: of the gradients, see `basis.trusted_directions`; 0 trusts all directions.
    """

    alternate: bool = True
    scale_gradient: bool = True
    calibrate: bool = True
    reconstruct: bool = True
    precision: float = 0.0

    @property
    def keep_raw(self) -> bool:
        """Whether moments live in the coordinates of the raw factors, as the paper prints them.

        In the whole method only rounding depends on the basis. With a block off more does, and the
        ablations are meant in the paper's coordinates.
        """
        return not (self.scale_gradient and self.calibrate and self.reconstruct)
