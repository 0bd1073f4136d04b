"""The linear layers of nnx that can carry an adapter, and a quantized one beside them."""

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
    """A `qwix.QArray`: integers, and a scale for each tile. It is no `nnx.Param`: frozen."""


class QuantizedLayer(nnx.Module):
    """A linear layer whose kernel lies in memory in 4 or 8 bits. Made by `quantize`.

    The kernel is restored where it is used, so the layer works under any transformation of the
    model, a scan over stacked layers among them.

    Attributes:
      kernel: a `QuantizedParam`.
      bias: as it was, or None.
      form, single_shape, dtype, precision: how the layer works, from the layer that it was.
    """

    def __init__(self, base: Any, stack: tuple[int, ...], qtype: QType, tile_size: int):
        """Quantizes the kernel of `base`, which is stacked on those axes.

        Raises:
          ValueError: tiles of that size do not fill the last input axis.
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
                f"tiles of {tile} do not fill an axis of {self.single_shape[axis]}: choose a "
                "tile_size that divides it"
            )
        kernel = base.kernel[...]
        tiled = [place for place in range(kernel.ndim) if place not in stack][axis]
        self.kernel = QuantizedParam(_quantize(kernel, tiled, tile, qtype))

    def __call__(self, x: jax.Array, *, out_sharding: Any = None) -> jax.Array:
        """The input and the result of the layer that it was."""
        import qwix

        kernel = qwix.dequantize(self.kernel.get_value())
        dtype = self.dtype or jnp.result_type(x, kernel)
        x, kernel = x.astype(dtype), kernel.astype(dtype)
        y = apply_kernel(self.form, x, kernel, self.precision, out_sharding)
        if self.bias is not None:
            y += broadcast_bias(self.form, self.bias[...].astype(dtype))
        return y


def form_of(layer: Any) -> Form:
    """How a layer contracts its input with its kernel.

    Raises:
      ValueError: a layer that is no product of its input and one kernel.
    """
    if isinstance(layer, QuantizedLayer):
        return layer.form
    if isinstance(layer, nnx.Linear):
        return Dense()
    if isinstance(layer, nnx.LinearGeneral):
        if layer.batch_axis:
            raise ValueError("an nnx.LinearGeneral with batch_axis: write it as an nnx.Einsum")
        return Dense(layer.axis, len(layer.out_features))
    if isinstance(layer, nnx.Einsum):
        if layer.einsum_str is None:
            raise ValueError("an nnx.Einsum needs its equation when it is made, not when called")
        return parse_einsum(layer.einsum_str)
    if layer.feature_group_count != 1 or layer.mask is not None:
        raise ValueError("a grouped or masked convolution is no product of two factors")
    return Convolution(
        layer.kernel_size, layer.strides, layer.padding, layer.input_dilation, layer.kernel_dilation
    )


def check_own_call(layer: Any) -> None:
    """Refuses a subclass that computes more than its base, which would be lost.

    Raises:
      ValueError: naming the class.
    """
    known = (*PLAIN, QuantizedLayer)
    if not any(type(layer).__call__ is kind.__call__ for kind in known):
        raise ValueError(
            f"{type(layer).__name__} has a __call__ of its own, which an adapter or a quantized "
            "kernel would not follow; put the plain layer inside it"
        )


def single_shape(layer: Any) -> tuple[int, ...]:
    """The kernel's shape as the layer itself knows it, without the axes of a stack."""
    if isinstance(layer, QuantizedLayer):
        return layer.single_shape
    if isinstance(layer, nnx.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nnx.LinearGeneral):
        return *layer.in_features, *layer.out_features
    return tuple(layer.kernel_shape)


def stacked_axes(layer: Any, batch: tuple[int, ...] | None) -> tuple[int, ...]:
    """The axes of the kernel on which a scan or a vmap has stacked the layer.

    Args:
      batch: the axes among which they are, as in `LoraRule`; None for all.

    Raises:
      ValueError: the shapes leave them in doubt.
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
            f"a kernel of shape {shape} in a layer made for {single} is stacked on "
            f"{'one of ' + str(found) if found else 'no axes that fit'}: "
            "say batch=(0,) for layers stacked on axis 0"
        )
    return found[0]


def _last_input(form: Form, dims: int) -> int:
    """The last axis of the kernel that is summed over."""
    if isinstance(form, Convolution):
        return dims - 2
    equation = form if isinstance(form, Einsum) else form.einsum()
    return equation.kernel.index(equation.inputs[-1])


def _quantize(kernel: jax.Array, tiled: int, tile: int, qtype: QType) -> Any:
    import qwix

    others = tuple(axis for axis in range(kernel.ndim) if axis != tiled)
    # Under jit, so that the distances to the levels are not all in memory at once.
    run = jax.jit(
        lambda kernel: qwix.quantize(
            kernel, qtype, channelwise_axes=others, tiled_axes={tiled: tile}
        )
    )
    return run(kernel)
