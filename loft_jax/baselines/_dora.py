"""DoRA: the weight as a magnitude per output and a direction, with LoRA on the direction."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from loft_jax.baselines._matrices import widen


@jax.default_matmul_precision("highest")
def dora_init(kernel: Float[Array, "..."]) -> Float[Array, " n"]:
    r"""Returns DoRA's initial magnitude, :math:`\|W_0\|_c`: the norm of each output's weights.

    Args:
      kernel: ``(in, out)``, floating point: the full pretrained weight. With `pissa_init` or
        `lora_ga_init`, pass the original weight and not the residual.

    Raises:
      ValueError: a kernel that is not a matrix.

    Returns:
      ``(out,)``, in the kernel's dtype: a leaf to train, for example ``lora_magnitude``.

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024, eq. (2). The paper
      uses the norms of the columns of a ``d x k`` weight. Here, as in the released code and in
      PEFT, there is one norm for each output, over its inputs.

    Example:
      >>> import jax.numpy as jnp
      >>> dora_init(jnp.array([[3.0, 0.0], [4.0, 2.0]])).tolist()
      [5.0, 2.0]
    """
    _check("dora_init", kernel)
    wide = widen(kernel)
    return jnp.sqrt(jnp.sum(wide * wide, axis=0)).astype(kernel.dtype)


@jax.default_matmul_precision("highest")
def dora_weight(
    kernel: Float[Array, "..."],
    magnitude: Float[Array, "..."],
    a: Float[Array, "..."],
    b: Float[Array, "..."],
    scale: float | jax.Array = 1.0,
    *,
    detach_norm: bool = True,
) -> Float[Array, "m n"]:
    r"""Returns DoRA's weight, the adapted direction scaled to the magnitude.

    .. math:: W' = m \frac{W_0 + s A B}{\|W_0 + s A B\|_c}

    Use `jax.vmap` for a stack of layers. An output whose weights are all zero has no direction and
    stays zero.

    Args:
      kernel: ``(in, out)``, frozen, floating point. It is cast to at least float32.
      magnitude: ``(out,)``, see `dora_init`.
      a: ``(in, r)``.
      b: ``(r, out)``; if it is initialised to zero, the initial weight is the kernel.
      scale: the adapter's own scale ``s``.
      detach_norm: True treats the norm as a constant in the gradient, as the paper recommends to
        save memory, and as PEFT always does. False uses the gradient of the formula.

    Returns:
      ``(in, out)``, in the kernel's dtype.

    Raises:
      ValueError: shapes that do not match.

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024, eq. (5); section
      4.3 for the constant norm (``dora_simple`` in the released code, its default). Columns have
      the same meaning as in `dora_init`.

    Example:
      >>> import jax.numpy as jnp
      >>> kernel = jnp.array([[3.0, 0.0], [4.0, 2.0]])
      >>> a, b = jnp.ones((2, 1)), jnp.zeros((1, 2))
      >>> bool(jnp.allclose(dora_weight(kernel, dora_init(kernel), a, b), kernel))
      True
    """
    _check("dora_weight", kernel, magnitude, a, b)
    direction = _direction(kernel, a, b, scale)
    weight = direction * _gain(direction, magnitude, detach_norm)
    return weight.astype(kernel.dtype)


def dora_output(
    x: Float[Array, "..."],
    kernel: Float[Array, "..."],
    magnitude: Float[Array, "..."],
    a: Float[Array, "..."],
    b: Float[Array, "..."],
    scale: float | jax.Array = 1.0,
    *,
    detach_norm: bool = True,
    dropped: Float[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    """Returns ``x @ dora_weight(...)``, with the adapter applied factor by factor.

    The products with ``x`` are those of a LoRA layer, in the caller's precision. Neither a merged
    weight in low precision nor its gradient is formed: only the norms need the merged weight.

    Args:
      x: ``(..., in)``.
      kernel, magnitude, a, b, scale, detach_norm: as in `dora_weight`.
      dropped: ``x`` after dropout, for training; None without dropout. As in the released code and
        in PEFT, what the adapter adds to ``x @ kernel`` is then computed from it.

    Returns:
      ``(..., out)``, without a bias, in the dtype of ``x @ kernel``.

    Raises:
      ValueError: shapes that do not match.

    Source: as `dora_weight`.

    Example:
      >>> import jax.numpy as jnp
      >>> kernel, a, b = jnp.eye(2), jnp.ones((2, 1)), jnp.zeros((1, 2))
      >>> dora_output(jnp.array([1.0, 2.0]), kernel, jnp.array([1.0, 3.0]), a, b).tolist()
      [1.0, 6.0]
    """
    _check("dora_output", kernel, magnitude, a, b)
    with jax.default_matmul_precision("highest"):
        gain = _gain(_direction(kernel, a, b, scale), magnitude, detach_norm)
    y = x @ kernel
    if dropped is None:
        return (gain * (y + scale * ((x @ a) @ b))).astype(y.dtype)
    added = (gain - 1) * (dropped @ kernel) + gain * scale * ((dropped @ a) @ b)
    return (y + added).astype(y.dtype)


def _direction(
    kernel: Float[Array, "m n"],
    a: Float[Array, "m r"],
    b: Float[Array, "r n"],
    scale: float | jax.Array,
) -> Float[Array, "m n"]:
    kernel = widen(kernel)
    return kernel + (scale * (widen(a) @ widen(b))).astype(kernel.dtype)


def _gain(
    direction: Float[Array, "m n"], magnitude: Float[Array, " n"], detach_norm: bool
) -> Float[Array, " n"]:
    """Returns the multiplier of each column of the direction, ``m / |column|``."""
    square = jnp.sum(direction * direction, axis=0)
    # The gradient of a root at zero is not finite, and gives NaN even if a later `where` masks it.
    norm = jnp.sqrt(jnp.where(square > 0, square, 1))
    return widen(magnitude) / (jax.lax.stop_gradient(norm) if detach_norm else norm)


def _check(name: str, kernel: jax.Array, *others: jax.Array) -> None:
    if kernel.ndim != 2:
        raise ValueError(
            f"{name} takes one matrix (in, out), got shape {kernel.shape}: reshape a kernel with "
            "several input or output axes, map over a stack of layers with jax.vmap"
        )
    (m, n), shapes = kernel.shape, [x.shape for x in others]
    r = shapes[-1][0] if shapes and shapes[-1] else 0
    if shapes and shapes != [(n,), (m, r), (r, n)]:
        raise ValueError(
            f"{name}: with a kernel of shape {kernel.shape} the magnitude is ({n},), the factors "
            f"({m}, r) and (r, {n}), got {', '.join(map(str, shapes))}"
        )
