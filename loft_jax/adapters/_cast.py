"""Casts adapters to the dtypes of serving, with little loss in the product of the factors."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Float

from loft_jax.pairs.axes import FactorLayout
from loft_jax.pairs.find import find_pairs
from loft_jax.pairs.spec import as_pairs

DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))

# A singular value below this part of the largest gives `a` the root of this part, so that training
# can go on from the result: a column that is zero in both factors would never move again.
_FLOOR = 1e-3


class CastAdapter(NamedTuple):
    """An adapter in another dtype, and what the cast costs.

    Attributes:
      adapter: the tree, with the factors as NumPy arrays in the new dtype.
      errors: by the path of ``a``, the error of the product of the cast factors, relative in the
        Frobenius norm. Of stacked layers the largest.
    """

    adapter: Any
    errors: dict[str, float]

    @property
    def largest_error(self) -> float:
        """The largest of the errors; 0 if there are none."""
        return max(self.errors.values(), default=0.0)


def cast_factors(adapter: Any, dtype: jax.typing.DTypeLike, pairs: Any = None) -> CastAdapter:
    r"""Casts the factors of an adapter, for serving.

    Only the product of the factors matters, so in float16 and bfloat16 this rounds the factors of
    the same product that rounding hurts least: :math:`a X` and :math:`b X^{-\top}`, in which every
    column carries an equal share of the largest singular value, so that the errors of the columns
    average out. Where rounding the given factors is no worse, it does that. Factors that the dtype
    represents are therefore not changed. float32 is a plain cast.

    Args:
      adapter: a pytree of the factors, of any layout and float dtype. Other leaves are kept.
      dtype: float32, float16 or bfloat16.
      pairs: names and axes of the factors, as in the optimizers.

    Returns:
      A `CastAdapter`.

    Raises:
      ValueError: the tree has no pairs or ambiguous ones, a factor contains a NaN or an infinity,
        or a product is too large for float16. The message names the path.
      TypeError: the dtype is another.

    Example:
      >>> a, b = np.random.default_rng(0).normal(size=(2, 64, 4))
      >>> adapter = {"lora_a": np.float32(a * [1, 1e3, 1e6, 1e9]), "lora_b": np.float32(b.T)}
      >>> adapter["lora_b"] /= np.array([[1], [1e3], [1e6], [1e9]], np.float32)
      >>> cast = cast_factors(adapter, "float16")
      >>> cast.adapter["lora_a"].dtype, cast.errors["lora_a"] < 4e-4
      (dtype('float16'), True)
    """
    dtype = np.dtype(dtype)
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    # A weight next to its own adapter is kept as it is, like all other leaves.
    tree = find_pairs(adapter, dataclasses.replace(as_pairs(pairs), train_weights=True))
    leaves, errors = list(tree.leaves), {}
    for pair in tree.pairs:
        ends = ((pair.a, pair.layout_a), (pair.b, pair.layout_b))
        factors = [_matrix(leaves[k], layout, tree.paths[k]) for k, layout in ends]
        a, b, error = cast_product(factors[0], factors[1], dtype)
        if not np.isfinite(error).all():
            raise ValueError(
                f"{tree.paths[pair.a]}: the product with {tree.paths[pair.b]} is too large for "
                f"{dtype}, even with balanced factors. Use bfloat16"
            )
        errors[tree.paths[pair.a]] = float(np.max(error, initial=0.0))
        for (k, layout), x in zip(ends, (a, b), strict=True):
            leaves[k] = np.asarray(layout.unmatricize(jnp.asarray(x), np.shape(leaves[k])))
    return CastAdapter(jax.tree.unflatten(tree.treedef, leaves), errors)


def _matrix(leaf: Any, layout: FactorLayout, path: str) -> np.ndarray:
    """Returns a factor as ``(*batch, rows, r)`` in float64."""
    x = np.asarray(leaf)  # JAX would round float64 to float32
    x = x.transpose(*layout.batch, *layout.rows, layout.rank)
    x = x.reshape(*x.shape[: len(layout.batch)], -1, x.shape[-1]).astype(np.float64)
    if not np.isfinite(x).all():
        raise ValueError(f"{path} contains a NaN or an infinity; training diverged")
    return x


def cast_product(
    a: Float[np.ndarray, "*batch m r"], b: Float[np.ndarray, "*batch n r"], dtype: np.dtype
) -> tuple[
    Float[np.ndarray, "*batch m r"], Float[np.ndarray, "*batch n r"], Float[np.ndarray, "*batch"]
]:
    """Returns factors in ``dtype`` whose product is nearly ``a b^T``, and its relative errors.

    Args:
      a, b: factors in float64.
      dtype: of the result. The errors are infinite where the product does not fit.
    """
    plain = _rounded(a, b, dtype)
    error = _relative_error(a, b, *plain)
    if dtype == np.float32:
        return *plain, error
    spread = _rounded(*spread_factors(a, b), dtype)
    error_of_spread = _relative_error(a, b, *spread)
    better = np.asarray(error_of_spread < error)[..., None, None]
    new_a, new_b = (np.where(better, x, y) for x, y in zip(spread, plain, strict=True))
    return new_a, new_b, np.asarray(np.minimum(error, error_of_spread))


def spread_factors(
    a: Float[np.ndarray, "*batch m r"], b: Float[np.ndarray, "*batch n r"]
) -> tuple[Float[np.ndarray, "*batch m r"], Float[np.ndarray, "*batch n r"]]:
    """Returns factors of ``a b^T`` whose columns carry nearly equal shares of it.

    With the singular values ``U S V^T`` these are ``U S^1/2 C D`` and ``V S^1/2 C D^-1``. Rounding
    changes the product by the sum of the columns' errors, ``e_j = eps |a_j| |b_j|`` each. Balanced
    factors have ``e_j = eps s_j``, so one large singular value loses as much as one number. The
    rows of the orthogonal matrix ``C``, a discrete cosine transform, give all columns the same
    share ``1 / r`` of the largest, so their sum is ``1 / sqrt(r)`` of that. It needs errors that
    differ between columns. They would not, if columns were equal: the diagonal ``D`` gives them
    different lengths, between 1 and 2.
    """
    r = a.shape[-1]
    (q_a, r_a), (q_b, r_b) = np.linalg.qr(a), np.linalg.qr(b)
    u, s, vt = np.linalg.svd(r_a @ r_b.swapaxes(-1, -2), full_matrices=False)
    floored = np.sqrt(np.maximum(s, _FLOOR * s[..., :1]))
    floored = np.where(floored > 0, floored, 1)
    cosines = _cosine_transform(r)[: s.shape[-1]]  # fewer rows than r in a matrix that is smaller
    lengths = 2.0 ** (np.arange(r) / r - 0.5)
    left = q_a @ (u * floored[..., None, :]) @ cosines * lengths
    right = q_b @ (vt.swapaxes(-1, -2) * (s / floored)[..., None, :]) @ cosines / lengths
    return left, right


def _cosine_transform(r: int) -> np.ndarray:
    """The orthogonal matrix of the DCT-II; the entries of its first row are equal."""
    k = np.arange(r)
    matrix = np.cos(np.pi * np.outer(k, 2 * k + 1) / (2 * r)) * np.sqrt(2 / r)
    matrix[0] /= np.sqrt(2)
    return matrix


def _rounded(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(over="ignore"):
        return a.astype(dtype), b.astype(dtype)


def _relative_error(
    a: np.ndarray, b: np.ndarray, new_a: np.ndarray, new_b: np.ndarray
) -> np.ndarray:
    """The Frobenius norm of the change of the product, relative to the product; no m x n array."""
    new_a, new_b = new_a.astype(np.float64), new_b.astype(np.float64)
    finite = np.asarray(np.isfinite(new_a).all((-2, -1)) & np.isfinite(new_b).all((-2, -1)))
    new_a, new_b = (np.where(finite[..., None, None], x, 0) for x in (new_a, new_b))
    # a' b'^T - a b^T = [a' - a, a] [b', b' - b]^T
    change = _norm(np.concatenate([new_a - a, a], -1), np.concatenate([new_b, new_b - b], -1))
    size = _norm(a, b)
    relative = change / np.where(size > 0, size, 1)
    return np.asarray(np.where(finite, relative, np.inf))


def _norm(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The Frobenius norm of ``a b^T``."""
    (_, r_a), (_, r_b) = np.linalg.qr(a), np.linalg.qr(b)
    return np.asarray(np.linalg.norm(r_a @ r_b.swapaxes(-1, -2), axis=(-2, -1)))
