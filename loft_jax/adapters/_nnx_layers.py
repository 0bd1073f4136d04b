"""The linear layers of nnx that can have an adapter, and a quantized layer."""

import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from loft_jax.adapters._layers import (
    Convolution,
    Dense,
    Einsum,
    Form,
    apply_kernel,
    broadcast_bias,
    parse_einsum,
)

PLAIN = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv)

QType = Literal["nf4", "int4", "int8"]


class QuantizedParam(nnx.Variable):
    """Holds a `qwix.QArray`: integers and a scale for each tile.

    It is not an `nnx.Param`, so it is frozen in training.

    Attributes:
      value: the `qwix.QArray`.
    """


class QuantizedLayer(nnx.Module):
    """A linear layer whose kernel is stored in 4 or 8 bits. `quantize` makes these.

    Each call dequantizes the kernel, so the layer works under any transformation of the model,
    including a scan over stacked layers.

    Attributes:
      kernel: a `QuantizedParam`.
      bias: the bias of the original layer, or None.
      form, single_shape, dtype, precision: how the original layer computes.

    Example:
      >>> from loft_jax.adapters import quantize
      >>> layer = quantize(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), qtype="nf4")
      >>> type(layer).__name__, layer(jnp.ones((1, 64))).shape
      ('QuantizedLayer', (1, 8))
    """

    def __init__(self, base: Any, stack: tuple[int, ...], qtype: QType, tile_size: int):
        """Quantizes the kernel of a layer.

        Args:
          base: the layer.
          stack: the axes of the kernel on which it is stacked.
          qtype: the number format.
          tile_size: how many numbers along the last input axis share a scale.

        Raises:
          ValueError: the tile size does not divide the last input axis.
        """
        self.form = form_of(base)
        self.single_shape = single_shape(base)
        self.dtype = base.dtype
        self.precision = base.precision
        self.bias = base.bias
        axis = _last_input(self.form, len(self.single_shape))
        tile = min(tile_size, self.single_shape[axis])
        if self.single_shape[axis] % tile:
            raise ValueError(
                f"tile_size {tile} does not divide the last input axis, which has "
                f"{self.single_shape[axis]} entries. Use a divisor of that number"
            )
        kernel = base.kernel[...]
        tiled = [k for k in range(kernel.ndim) if k not in stack][axis]
        self.kernel = QuantizedParam(_quantize(kernel, tiled, tile, qtype))

    def __call__(self, x: jax.Array, *, out_sharding: Any = None) -> jax.Array:
        """Applies the layer; arguments and result are those of the original layer."""
        import qwix

        kernel = qwix.dequantize(self.kernel.get_value())
        dtype = self.dtype or jnp.result_type(x, kernel)
        x, kernel = x.astype(dtype), kernel.astype(dtype)
        y = apply_kernel(self.form, x, kernel, self.precision, out_sharding)
        if self.bias is not None:
            y += broadcast_bias(self.form, self.bias[...].astype(dtype))
        return y


def form_of(layer: Any) -> Form:
    """Returns how a layer contracts its input with its kernel.

    Raises:
      ValueError: the layer is not a product of its input and one kernel.
    """
    if isinstance(layer, QuantizedLayer):
        return layer.form
    if isinstance(layer, nnx.Linear):
        return Dense()
    if isinstance(layer, nnx.LinearGeneral):
        if layer.batch_axis:
            raise ValueError(
                "an nnx.LinearGeneral with batch_axis is not supported. Use an nnx.Einsum instead"
            )
        return Dense(layer.axis, len(layer.out_features))
    if isinstance(layer, nnx.Einsum):
        if layer.einsum_str is None:
            raise ValueError(
                "an nnx.Einsum must get its equation in its constructor, not in its call"
            )
        return parse_einsum(layer.einsum_str)
    if layer.feature_group_count != 1 or layer.mask is not None:
        raise ValueError("a grouped or masked convolution is not supported")
    return Convolution(
        layer.kernel_size, layer.strides, layer.padding, layer.input_dilation, layer.kernel_dilation
    )


def check_own_call(layer: Any) -> None:
    """Refuses subclasses with their own ``__call__``, which an adapter would not apply.

    Raises:
      ValueError: the layer is of such a class, which the message names.
    """
    known = (*PLAIN, QuantizedLayer)
    if not any(type(layer).__call__ is kind.__call__ for kind in known):
        raise ValueError(
            f"{type(layer).__name__} overrides __call__, which an adapter or a quantized kernel "
            "would bypass. Make the plain layer an attribute of it instead"
        )


def single_shape(layer: Any) -> tuple[int, ...]:
    """Returns the shape of the kernel of one layer, without stacked axes."""
    if isinstance(layer, QuantizedLayer):
        return layer.single_shape
    if isinstance(layer, nnx.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nnx.LinearGeneral):
        return *layer.in_features, *layer.out_features
    return tuple(layer.kernel_shape)


def stacked_axes(layer: Any, batch: tuple[int, ...] | None) -> tuple[int, ...]:
    """Returns the axes of the kernel on which a scan or a vmap has stacked the layer.

    Args:
      layer: the layer, whose own sizes are compared with the shape of its kernel.
      batch: the axes to choose from, as in `LoraRule`; None for all.

    Raises:
      ValueError: the shapes fit several axes, or none.
    """
    shape, single = tuple(layer.kernel.get_value().shape), single_shape(layer)
    extra = max(len(shape) - len(single), 0)
    among = range(len(shape)) if batch is None else sorted(batch)[:extra]  # then the experts'
    found = [
        axes
        for axes in itertools.combinations(among, extra)
        if tuple(n for axis, n in enumerate(shape) if axis not in axes) == single
    ]
    if len(found) != 1:
        raise ValueError(
            f"the kernel has shape {shape} and one layer {single}, so the stacked axes "
            f"{'may be any of ' + str(found) if found else 'cannot be found'}. "
            "Specify them, for example batch=(0,) for layers stacked on axis 0"
        )
    return found[0]


def _last_input(form: Form, dims: int) -> int:
    """Returns the last axis of the kernel that is summed over."""
    if isinstance(form, Convolution):
        return dims - 2
    equation = form if isinstance(form, Einsum) else form.einsum()
    return equation.kernel.index(equation.inputs[-1])


def _quantize(kernel: jax.Array, tiled: int, tile: int, qtype: QType) -> Any:
    import qwix

    others = tuple(axis for axis in range(kernel.ndim) if axis != tiled)
    # Under jit, so that XLA does not hold all distances to the levels in memory at once.
    run = jax.jit(
        lambda kernel: qwix.quantize(
            kernel, qtype, channelwise_axes=others, tiled_axes={tiled: tile}
        )
    )
    return run(kernel)
