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
from jaxtyping import Array, Float

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
"""``(key, input, count) ->`` new columns of ``U`` and of ``V``, of any length; see `DIRECTIONS`."""


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
        singular values. All of them stay as they are.
      count: how many directions are new; ``keep + count`` is the new rank.
      directions: what the new ones are. They are made orthogonal to those that stay.
      size: the singular values of the new product ``s U_+ V_+^T``, relative to the root mean square
        of those of ``s U V^T``.

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
    grams = FactorPair(u.T @ u, v.T @ v)
    mean_square = jnp.sum(grams.a * grams.b) / u.shape[1]
    kept = given.factors if keep >= u.shape[1] else _leading(given.factors, keep)
    if not count:
        return kept
    new = directions(key, given, count)

    def extend(own: Array, gram: Array, old: Array, new: Array) -> Array:
        # Both factors get the root of the singular value. Where one is still zero, as at the start
        # of training, it stays zero, and the other keeps its size.
        own_length = jnp.sqrt(jnp.trace(gram) / own.shape[1])
        length = jnp.where(mean_square > 0, size**0.5 * mean_square**0.25, own_length)
        return jnp.concatenate([old, length * _outside(old, new)], axis=1)

    return FactorPair(*(extend(*of) for of in zip(given.factors, grams, kept, new, strict=True)))


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
        nu = second_moment.carry(nu, carried, dim)
    return Moments(mu, nu)


def _leading(factors: Factors, keep: int) -> Factors:
    """Returns balanced factors of the leading part of the product: singular vectors, scaled."""
    u, v = factors
    q = orthonormal_basis(u).q
    assert q is not None
    core = (q.T @ u) @ (v.T @ v) @ (u.T @ q)
    values, vectors = symmetric_eigen(core)
    left = q @ vectors[:, jnp.argsort(-values)[:keep]]
    right = v @ (u.T @ left)
    root = jnp.sqrt(jnp.linalg.norm(right, axis=0))
    return FactorPair(left * root, right / jnp.where(root > 0, root, 1))


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
