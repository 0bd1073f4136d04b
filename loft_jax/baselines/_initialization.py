"""Initial values of the factors: PiSSA and LoRA-GA, and the scale of rsLoRA.

Both initialisations start from nonzero factors and subtract their scaled product from the frozen
weight, so that the model initially computes the same function as before.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from loft_jax.baselines._matrices import widen


class LoraInit(NamedTuple):
    """A weight split into a frozen residual and an adapter, ``kernel = residual + scale * a @ b``.

    Attributes:
      residual: ``(m, n)``, which replaces the frozen kernel.
      a: ``(m, r)``, the initial ``lora_a``.
      b: ``(r, n)``, the initial ``lora_b``.
    """

    residual: Float[Array, "m n"]
    a: Float[Array, "m r"]
    b: Float[Array, "r n"]


def rslora_scale(alpha: int | float, rank: int) -> float:
    r"""Returns the scale of rsLoRA, :math:`\alpha / \sqrt r`, which replaces LoRA's ``alpha / r``.

    Args:
      alpha: LoRA's alpha.
      rank: the adapter's rank.

    Returns:
      The scale, for `loft_jax.LoraPairs`.

    Raises:
      ValueError: a rank below 1.

    Source: Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023.

    Example:
      >>> rslora_scale(16, 64)
      2.0
    """
    if rank < 1:
        raise ValueError(f"rslora_scale: rank must be at least 1, got {rank}")
    return alpha / math.sqrt(rank)


@jax.default_matmul_precision("highest")
def pissa_init(
    kernel: Float[Array, "..."],
    rank: int,
    scale: float | jax.Array = 1.0,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    iterations: int | None = None,
) -> LoraInit:
    r"""Initialises the adapter with the principal part of the weight; the rest is the residual.

    With the singular value decomposition :math:`W = U S V^\top` and its first ``r`` triplets,

    .. math::
      A = U_r (S_r / s)^{1/2}, \quad B = (S_r / s)^{1/2} V_r^\top, \quad W_{res} = W - s A B.

    For a stack of layers, use ``jax.vmap(lambda w: pissa_init(w, rank))(kernels)``.

    Args:
      kernel: ``(in, out)``, floating point. It is cast to at least float32.
      rank: the adapter's rank.
      scale: the adapter's own scale ``s``, positive.
      dtype: dtype of the factors; None for the kernel's. The residual has the kernel's dtype.
      iterations: None for the exact decomposition, or the number of subspace iterations (Halko et
        al., 2011) on twice as many directions as needed, much faster for a large kernel and a small
        rank. The residual absorbs the approximation error.

    Returns:
      The residual kernel ``(in, out)``, and the factors ``(in, rank)`` and ``(rank, out)``.

    Raises:
      ValueError: a kernel that is not a matrix, a rank below 1 or above one of its sizes, a scale
        that is not positive.
      TypeError: a kernel that is not floating point.

    Source: Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large
      Language Models", NeurIPS 2024, eqs. (2) to (4). The paper has no scale. As in the released
      code (and PEFT), the singular values are divided by the scale and the residual is a
      difference. Each pair of singular vectors has the sign that makes the largest entry of the
      left one positive.

    Example:
      >>> import jax.numpy as jnp
      >>> kernel = jnp.array([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
      >>> residual, a, b = pissa_init(kernel, rank=1, scale=0.5)
      >>> bool(jnp.allclose(0.5 * a @ b, kernel.at[1, 1].set(0.0), atol=1e-6))
      True
      >>> bool(jnp.allclose(residual, kernel.at[0, 0].set(0.0), atol=1e-6))
      True
    """
    _check("pissa_init", kernel, rank, rank)
    if isinstance(scale, (int, float)) and scale <= 0:
        raise ValueError(f"pissa_init: the scale must be positive, got {scale}")
    u, s, vt = _leading_triplets(widen(kernel), rank, iterations)
    root = jnp.sqrt(s / scale)
    return _split(kernel, u * root, root[:, None] * vt, scale, dtype)


@jax.default_matmul_precision("highest")
def lora_ga_init(
    kernel: Float[Array, "..."],
    gradient: Float[Array, "..."],
    rank: int,
    scale: float | jax.Array = 1.0,
    *,
    gamma: float | jax.Array = 16.0,
    dtype: jax.typing.DTypeLike | None = None,
    iterations: int | None = None,
) -> LoraInit:
    r"""Initialises the adapter with the leading directions of the weight's gradient.

    With the singular value decomposition of the gradient, :math:`G = U S V^\top`,

    .. math::
      A = c\, U_{1..r}, \quad B = c\, V_{r+1..2r}^\top, \quad c = n^{1/4} / \gamma^{1/2}, \quad
      W_{res} = W - s A B.

    A small gradient step on both factors then changes the weight by :math:`-\eta s^2 c^2 G_{2r}`,
    where :math:`G_{2r}` is the best approximation of the gradient of rank ``2 r``, the highest
    possible rank of such a step.

    For a stack of layers, use ``jax.vmap(lambda w, g: lora_ga_init(w, g, rank))``.

    Args:
      kernel: ``(in, out)``, floating point. It is cast to at least float32.
      gradient: ``(in, out)``, of the loss with respect to the kernel, a mean over some batches. Its
        magnitude has no effect.
      rank: the adapter's rank.
      scale: the adapter's own scale ``s``; the paper uses `rslora_scale`.
      gamma: the square of the paper's gamma. Lower values give larger factors.
      dtype: dtype of the factors; None for the kernel's. The residual has the kernel's dtype.
      iterations: as in `pissa_init`, for the decomposition of the gradient.

    Returns:
      The residual kernel ``(in, out)``, and the factors ``(in, rank)`` and ``(rank, out)``.

    Raises:
      ValueError: a kernel that is not a matrix, a gradient of another shape, a rank below 1 or
        above half of one of the sizes.
      TypeError: a kernel that is not floating point.

    Source: Wang et al., "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", NeurIPS 2024,
      Theorem 3.1 and Algorithm 1. As in the released code (and PEFT), the factors are divided by
      ``gamma ** 0.5``, with a default gamma of 16, where the paper divides by its gamma. The
      released code's optional clipping of the product to the largest entry of the weight is
      omitted, and its randomised decomposition is an option here (``iterations``). Signs are chosen
      as in `pissa_init`.

    Example:
      >>> import jax.numpy as jnp
      >>> gradient = jnp.diag(jnp.array([5.0, 3.0, 1.0]))
      >>> residual, a, b = lora_ga_init(jnp.zeros((3, 3)), gradient, rank=1, gamma=3**0.5)
      >>> bool(jnp.allclose(a[:, 0], jnp.array([1.0, 0.0, 0.0]), atol=1e-6))
      True
      >>> bool(jnp.allclose(b[0], jnp.array([0.0, 1.0, 0.0]), atol=1e-6))
      True
    """
    _check("lora_ga_init", kernel, rank, 2 * rank)
    if gradient.shape != kernel.shape:
        raise ValueError(
            f"lora_ga_init: the gradient has shape {gradient.shape}, the kernel {kernel.shape}"
        )
    u, _, vt = _leading_triplets(widen(gradient), 2 * rank, iterations)
    size = kernel.shape[1] ** 0.25 / jnp.sqrt(jnp.asarray(gamma, u.dtype))
    return _split(kernel, size * u[:, :rank], size * vt[rank:], scale, dtype)


def _split(
    kernel: Float[Array, "m n"],
    a: Float[Array, "m r"],
    b: Float[Array, "r n"],
    scale: float | jax.Array,
    dtype: jax.typing.DTypeLike | None,
) -> LoraInit:
    """Rounds the factors and subtracts the product of the rounded factors from the kernel."""
    a, b = (x.astype(dtype or kernel.dtype) for x in (a, b))
    product = widen(a) @ widen(b)
    scale = jnp.asarray(scale, product.dtype)
    return LoraInit((widen(kernel) - scale * product).astype(kernel.dtype), a, b)


def _leading_triplets(
    w: Float[Array, "m n"], k: int, iterations: int | None
) -> tuple[Float[Array, "m k"], Float[Array, " k"], Float[Array, "k n"]]:
    """Returns the first ``k`` singular triplets, the largest entry of each left vector positive."""
    if iterations is None:
        u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    else:
        width = min(2 * k, *w.shape)
        # A fixed key: the start has little effect, and repeated calls should agree.
        start = jax.random.normal(jax.random.key(0), (w.shape[1], width), w.dtype)
        q = jnp.linalg.qr(w @ start)[0]
        for _ in range(iterations):
            q = jnp.linalg.qr(w @ jnp.linalg.qr(w.T @ q)[0])[0]
        u, s, vt = jnp.linalg.svd(q.T @ w, full_matrices=False)
        u = q @ u
    u, s, vt = u[:, :k], s[:k], vt[:k]
    largest = jnp.take_along_axis(u, jnp.argmax(jnp.abs(u), axis=0)[None], axis=0)
    sign = jnp.where(largest < 0, -1, 1).astype(w.dtype)
    return u * sign, s, sign.T * vt


def _check(name: str, kernel: jax.Array, rank: int, wanted: int) -> None:
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise TypeError(f"{name} takes a floating-point kernel, got {kernel.dtype}: dequantize it")
    if kernel.ndim != 2:
        raise ValueError(
            f"{name} takes one matrix (in, out), got shape {kernel.shape}: reshape a kernel with "
            "several input or output axes, map over a stack of layers with jax.vmap"
        )
    if rank < 1 or wanted > min(kernel.shape):
        raise ValueError(
            f"{name}: rank {rank} must be at least 1, and needs {wanted} singular vectors where a "
            f"kernel of shape {kernel.shape} has {min(kernel.shape)}"
        )
