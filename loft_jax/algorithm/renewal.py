"""Renewal of a pair: other directions for the factors, the same weight, the moments carried over.

A part ``C`` of the product ``s U V^T`` stays with the factors, the rest goes to the frozen weight.
New directions enter with a small product ``s U_+ V_+^T`` of their own, which is taken out of the
frozen weight, so that the weight itself does not change. Both factors are then of full rank, and
the moments of each have a basis to live in: a factor of zeros would lose its partner's.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from loft_jax.algorithm.basis import Basis, calibration_matrix, orthonormal_basis
from loft_jax.algorithm.jacobi import symmetric_eigen
from loft_jax.algorithm.pair import FactorPair, Moments
from loft_jax.algorithm.second_moment import SecondMoment
from loft_jax.algorithm.sharded_dim import UNSHARDED, ShardedDim

Factors = FactorPair[Float[Array, "_ r"]]


class RenewalInput(NamedTuple):
    """What new directions can be chosen from.

    Attributes:
      factors: ``U`` and ``V``.
      moments: the first moments of both, ``m x r`` and ``n x r``; None where the optimizer has
        none. That of ``U`` is a sketch ``E[G] Q`` of the mean gradient of the weight.
    """

    factors: Factors
    moments: FactorPair[Float[Array, "_ r"]] | None


Directions = Callable[[jax.Array, RenewalInput, int], Factors]
"""``(key, input, count) ->`` new columns of ``U``, ``m x count``, and of ``V``, ``n x count``.

They may have any length, and have to be linearly independent of each other; see `DIRECTIONS`.
"""


def random_directions(key: jax.Array, given: RenewalInput, count: int) -> Factors:
    """Returns normal columns, ``m x count`` and ``n x count``."""
    of_a, of_b = jax.random.split(key)
    draw = lambda key, x: jax.random.normal(key, (x.shape[0], count), x.dtype)
    return FactorPair(draw(of_a, given.factors.a), draw(of_b, given.factors.b))


def momentum_directions(key: jax.Array, given: RenewalInput, count: int) -> Factors:
    """Returns the leading left singular vectors of the first moments.

    The moment of ``U`` is the mean gradient times the basis of ``V``, so its columns are one step
    of the power iteration for the leading singular vectors of that gradient; and nothing ``m x n``
    is formed. A thousandth of a random direction is added: it remains where the moments have fewer
    directions than are asked for.
    """
    assert given.moments is not None

    def leading(moment: Float[Array, "m r"], noise: Float[Array, "m k"]) -> Float[Array, "m k"]:
        values, vectors = symmetric_eigen(moment.T @ moment)
        order = jnp.argsort(-values)[:count]
        found = moment @ vectors[:, order]
        found = jnp.pad(found, ((0, 0), (0, noise.shape[1] - found.shape[1])))
        return _of_unit_length(found) + 1e-3 * _of_unit_length(noise)

    noise = random_directions(key, given, count)
    return FactorPair(leading(given.moments.a, noise.a), leading(given.moments.b, noise.b))


DIRECTIONS: dict[str, Directions] = {
    "random": random_directions,
    "momentum": momentum_directions,
}


def renew_factors(
    key: jax.Array,
    given: RenewalInput,
    keep: int,
    count: int,
    directions: Directions,
    size: float,
) -> Factors:
    """Returns the factors of a renewed pair.

    Args:
      key: of the pair's random numbers.
      given: the factors, and first moments.
      keep: how many directions stay: the leading singular vectors of the product, with their
        singular values. All of them stay as they are. Where the product has fewer, random new
        directions take their place.
      count: how many directions are new; ``keep + count`` is the new rank.
      directions: what the new ones are. They are made orthogonal to those that stay.
      size: the singular values of the new product ``s U_+ V_+^T``, relative to the root mean square
        of those of ``s U V^T``.

    Raises:
      ValueError: ``directions`` returns columns of other shapes.

    Example:
      >>> pair = FactorPair(jnp.diag(jnp.array([3.0, 2.0, 1.0]))[:, :2], jnp.eye(4)[:, :2])
      >>> given, key = RenewalInput(pair, None), jax.random.key(0)
      >>> new = renew_factors(key, given, 1, 2, random_directions, 1.0)
      >>> new.a.shape, new.b.shape
      ((3, 3), (4, 3))
      >>> bool(jnp.allclose(new.a[:, :1] @ new.b[:, :1].T, jnp.diag(3 * jnp.eye(4)[0])[:3]))
      True
      >>> singular = jnp.linalg.svd(new.a @ new.b.T, compute_uv=False)[:3]
      >>> (singular**2).round(2)
      Array([9. , 6.5, 6.5], dtype=float32)
    """
    u, v = given.factors
    if not count and keep >= u.shape[1]:
        return given.factors
    left, right = _orthonormal_left(given.factors)
    # A sum of squares: from the Gram matrices of the factors it could cancel.
    mean_square = jnp.sum(right**2) / u.shape[1]
    noise = jnp.finfo(u.dtype).eps * jnp.linalg.norm(u) * jnp.linalg.norm(v)
    empty = jnp.sqrt(mean_square) <= 8 * noise
    if keep >= u.shape[1]:
        kept, holds = given.factors, jnp.ones(keep, bool)
    else:
        kept, holds = _leading(left, right, keep, 8 * noise)
    new = _new_columns(key, given, count, directions)
    # What is kept of a product of lower rank is nothing, and such a direction is new as well.
    spare = random_directions(jax.random.fold_in(key, 1), given, kept.a.shape[1])

    # Both factors get the root of the singular value. Without a product, as at the start of
    # training, one factor is zero, and the other keeps its size.
    own = FactorPair(*(jnp.linalg.norm(x) / x.shape[1] ** 0.5 for x in given.factors))
    length = size**0.5 * mean_square**0.25
    lengths = FactorPair(
        jnp.where(empty, own.a, length),
        jnp.where(empty, jnp.where(own.a > 0, 0, own.b), length),
    )

    def extend(length: Array, old: Array, new: Array, spare: Array) -> Array:
        old = jnp.where(holds, old, 0)
        found = _outside(old, jnp.concatenate([jnp.where(holds, 0, spare), new], axis=1))
        return length * found + jnp.pad(old, ((0, 0), (0, count)))

    return FactorPair(*(extend(*of) for of in zip(lengths, kept, new, spare, strict=True)))


def _new_columns(
    key: jax.Array, given: RenewalInput, count: int, directions: Directions
) -> Factors:
    if not count:
        return FactorPair(*(x[:, :0] for x in given.factors))
    new = FactorPair(*directions(key, given, count))
    expected = [(x.shape[0], count) for x in given.factors]
    if [jnp.shape(x) for x in new] != expected:
        raise ValueError(
            f"directions returned columns of shapes {[jnp.shape(x) for x in new]}, and has to "
            f"return {expected}"
        )
    return new


def carry_moments(
    second_moment: SecondMoment | None,
    moments: Moments,
    previous: Float[Array, "n r"],
    old: Basis,
    new: Basis,
    dim: ShardedDim = UNSHARDED,
) -> Moments:
    """Returns the moments of a factor in the basis of its renewed partner, of any rank.

    They first come from the last step's basis into that of the partner as it is now, by the rule of
    every step. So nothing changes where the renewed partner has the same basis.

    Args:
      second_moment: how ``nu`` is kept; None where there is none.
      moments: in the previous basis.
      previous: the partner's basis matrix at the last step, orthonormal.
      old, new: the bases of the partner, before and after the renewal.
      dim: how the rows of the factor are sharded.
    """
    now, carried = calibration_matrix(previous, old), calibration_matrix(old.matrix, new)
    mu, nu = moments
    if mu is not None:
        mu = mu @ now @ carried
    if nu is not None and second_moment is not None:
        none = jnp.zeros((nu.shape[0], previous.shape[1]), nu.dtype)
        nu = second_moment.advance(nu, none, now, None, 1.0, dim)
        # A partner of lower rank has columns of zeros in its basis, and moments of zero there.
        known = jnp.maximum(old.dim.sum(jnp.sum(old.matrix**2)), 1)
        nu = second_moment.carry(nu, carried, known, dim)
    return Moments(mu, nu)


def _orthonormal_left(factors: Factors) -> tuple[Float[Array, "m r"], Float[Array, "n r"]]:
    """Returns ``X, Y`` with ``U V^T = X Y^T`` and orthonormal columns of ``X``."""
    u, v = factors
    q = orthonormal_basis(u).q
    assert q is not None
    return q, v @ (u.T @ q)


def _leading(
    left: Float[Array, "m r"], right: Float[Array, "n r"], keep: int, noise: Float[Array, ""]
) -> tuple[Factors, Bool[Array, " keep"]]:
    """Returns balanced factors of the leading part of a product: singular vectors, scaled.

    Also returns which of them are more than rounding.
    """
    values, vectors = symmetric_eigen(right.T @ right)
    vectors = vectors[:, jnp.argsort(-values)[:keep]]
    left, right = left @ vectors, right @ vectors
    size = jnp.linalg.norm(right, axis=0)
    root = jnp.sqrt(size)
    return FactorPair(left * root, right / jnp.where(root > 0, root, 1)), size > noise


def _outside(old: Float[Array, "m k"], new: Float[Array, "m c"]) -> Float[Array, "m c"]:
    """Returns an orthonormal basis of ``new`` that is orthogonal to ``old``."""
    # Columns of one length: the basis takes those that are far shorter than others for rounding.
    columns = _of_unit_length(jnp.concatenate([old, new], axis=1))
    q = orthonormal_basis(columns).q
    assert q is not None
    return q[:, old.shape[1] :]


def _of_unit_length(x: Float[Array, "m k"]) -> Float[Array, "m k"]:
    largest = jnp.max(jnp.abs(x), axis=0)
    x = x / jnp.where(largest > 0, largest, 1)
    length = jnp.linalg.norm(x, axis=0)
    return x / jnp.where(length > 0, length, 1)
