"""Casts adapters under the names of transformers, for every exporter."""

import warnings
from collections.abc import Mapping

import jax
import numpy as np

from loft_jax.adapters._cast import DTYPES, cast_product
from loft_jax.adapters._loaded import LoraFactors
from loft_jax.adapters._safetensors import check_finite


def cast_modules(
    factors: Mapping[str, LoraFactors], dtype: jax.typing.DTypeLike | None
) -> tuple[dict[str, LoraFactors], dict[str, str]]:
    """Casts the factors of each module as `cast_factors` does.

    Args:
      factors: adapters by module, of any float dtype.
      dtype: float32, float16 or bfloat16; None keeps the dtypes.

    Returns:
      Adapters of nearly the same products, and what the metadata of their file states: the largest
      relative error of a product. Magnitudes (DoRA) keep their dtype.

    Raises:
      ValueError: a value is NaN or infinite, or a product is too large for float16. The message
        names the module.
      TypeError: the dtype is another.

    Example:
      >>> one = LoraFactors(np.ones((6, 3)), np.ones((3, 4)), scale=2.0)
      >>> cast, metadata = cast_modules({"up": one}, "float16")
      >>> cast["up"].a.dtype, metadata
      (dtype('float16'), {'largest_product_error': '0'})
    """
    if dtype is None:
        return dict(factors), {}
    kind = np.dtype(dtype)
    if kind not in DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {kind}")
    cast: dict[str, LoraFactors] = {}
    errors: dict[str, float] = {}
    for module, one in factors.items():
        a, b = (x.astype(np.float64) for x in one.matrices())
        b = b.swapaxes(1, 2)
        check_finite({f"{module}.lora_a": a, f"{module}.lora_b": b}, "the adapter")
        a, b, error = cast_product(a, b, kind)
        if not np.isfinite(error).all():
            raise ValueError(
                f"{module}: the product of the factors is too large for {kind}, even with balanced "
                "factors. Use bfloat16"
            )
        errors[module] = float(error.max())
        b = b.swapaxes(1, 2)
        cast[module] = one._replace(a=a.reshape(one.a.shape), b=b.reshape(one.b.shape))
    _warn_of_losses(errors, kind)
    return cast, {"largest_product_error": f"{max(errors.values(), default=0.0):.2g}"}


def _warn_of_losses(errors: Mapping[str, float], dtype: np.dtype) -> None:
    epsilon = float(jax.numpy.finfo(dtype).eps)
    if lossy := [module for module, error in errors.items() if error > epsilon]:
        worst = max(lossy, key=lambda module: errors[module])
        warnings.warn(
            f"{dtype} loses {errors[worst]:.2g} of the product of {worst}, {len(lossy)} of "
            f"{len(errors)} adapters lose more than a cast usually does. The product may be too "
            "small for the dtype: save bfloat16 or float32",
            stacklevel=4,
        )
