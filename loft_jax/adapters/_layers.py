"""The adapter of one linear layer: the shapes of its factors and their product.

A linear layer contracts its input with a kernel. Each axis of the kernel is an input axis (summed
over), an output axis, or a batch axis, which appears in both input and output (experts). The
factors share these axes: ``a`` is (*batch, *inputs, rank) and ``b`` is (*batch, rank, *outputs).
Each group keeps the order of the kernel, and the product over the rank has the kernel's axes. An
einsum equation describes every layer except a convolution, whose ``a`` is the kernel of a
convolution to ``rank`` channels.
"""

import dataclasses
import math
import string
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Einsum:
    """A layer ``y = einsum("lhs,kernel->out", x, kernel)``.

    Attributes:
      lhs, kernel, out: the letters of each array, without spaces.

    Example:
      >>> Einsum("ebd", "edf", "ebf").batch  # experts
      'e'
    """

    lhs: str
    kernel: str
    out: str

    @property
    def batch(self) -> str:
        """The axes of the kernel that both factors have."""
        return "".join(axis for axis in self.kernel if axis in self.lhs and axis in self.out)

    @property
    def inputs(self) -> str:
        """The axes of the kernel that are summed over."""
        return "".join(axis for axis in self.kernel if axis not in self.out)

    @property
    def outputs(self) -> str:
        """The axes of the kernel that the input does not have."""
        return "".join(axis for axis in self.kernel if axis not in self.lhs)

    @property
    def rank(self) -> str:
        """An unused letter, for the rank."""
        taken = self.lhs + self.kernel + self.out
        return next(axis for axis in reversed(string.ascii_letters) if axis not in taken)


@dataclasses.dataclass(frozen=True)
class Dense:
    """A layer that contracts some axes of its input and appends new ones.

    Attributes:
      axes: the axes of the input that are contracted.
      outputs: the number of new axes.
    """

    axes: tuple[int, ...] = (-1,)
    outputs: int = 1

    def einsum(self, dims: int | None = None) -> Einsum:
        """Returns the equation of the layer.

        Args:
          dims: number of dimensions of the input; None for as many as the axes need.

        Example:
          >>> Dense(axes=(-1,), outputs=2).einsum(dims=3)
          Einsum(lhs='abc', kernel='cde', out='abde')
        """
        if dims is None:
            dims = len(self.axes) + max(map(abs, self.axes))
        lhs = string.ascii_letters[:dims]
        # The input axes of the kernel are in the order of the input, in whatever order `axes` is.
        contracted = "".join(lhs[axis] for axis in sorted(axis % dims for axis in self.axes))
        new = string.ascii_letters[dims : dims + self.outputs]
        kept = "".join(axis for axis in lhs if axis not in contracted)
        return Einsum(lhs, contracted + new, kept + new)


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A convolution over windows. All axes of its kernel except the last are inputs.

    Attributes:
      kernel_size, strides, padding, input_dilation, kernel_dilation: as in Flax's `Conv`.
    """

    kernel_size: tuple[int, ...]
    strides: Any
    padding: Any
    input_dilation: Any
    kernel_dilation: Any

    def __call__(self, x: jax.Array, kernel: jax.Array, precision: Any) -> jax.Array:
        """Applies Flax's convolution with this kernel and without a bias."""
        layer = nn.Conv(
            features=kernel.shape[-1],
            kernel_size=self.kernel_size,
            strides=self.strides,
            padding=self.padding,
            input_dilation=self.input_dilation,
            kernel_dilation=self.kernel_dilation,
            use_bias=False,
            precision=precision,
            parent=None,
        )
        y = layer.apply({"params": {"kernel": kernel}}, x)
        assert isinstance(y, jax.Array)
        return y


Form = Dense | Einsum | Convolution


def parse_einsum(equation: str) -> Einsum:
    """Parses the equation of an einsum layer.

    Raises:
      ValueError: the equation does not have two operands and ``->``, the kernel has an ellipsis or
        a repeated letter, or an axis of the kernel is in neither input nor output.
    """
    operands, arrow, out = equation.replace(" ", "").partition("->")
    lhs, comma, kernel = operands.partition(",")
    if not arrow or not comma or "," in kernel:
        raise ValueError(f"the equation {equation!r} does not have the form 'x,kernel->y'")
    if "." in kernel or len(set(kernel)) < len(kernel):
        raise ValueError(
            f"the equation {equation!r} must name each axis of the kernel by a different letter"
        )
    if summed := [axis for axis in kernel if axis not in lhs and axis not in out]:
        raise ValueError(
            f"the equation {equation!r} sums the kernel over its axis {summed[0]!r} alone, which "
            "an adapter cannot follow"
        )
    return Einsum(lhs, kernel, out)


def factor_shapes(
    form: Form, kernel: tuple[int, ...], rank: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Returns the shapes of the batch axes, of ``a`` without them, and of ``b`` without them.

    Args:
      form: how the layer contracts its input with the kernel.
      kernel: the shape of the kernel, without stacked axes.
      rank: of the adapter.

    Raises:
      ValueError: the rank is above both dimensions of the kernel.

    Example:
      >>> factor_shapes(parse_einsum("btd,ndh->btnh"), (4, 64, 16), rank=8)
      ((), (64, 8), (8, 4, 16))
    """
    batch, inputs, outputs = _divide(form, kernel)
    limit = max(math.prod(inputs), math.prod(outputs))
    if rank > limit:
        raise ValueError(
            f"rank {rank} is above {limit}, the larger dimension of the kernel {kernel} as a matrix"
        )
    return batch, (*inputs, rank), (rank, *outputs)


def draw_factor(
    key: jax.Array, init: Any, shape: tuple[int, ...], dtype: Any, batch: tuple[int, ...] = ()
) -> jax.Array:
    """Returns a new factor (*batch, *shape). The fan-in of the initializer is that of `shape`."""
    if not batch:
        return init(key, shape, dtype)
    keys = jax.random.split(key, math.prod(batch))
    drawn = jax.vmap(lambda key: init(key, shape, dtype))(keys)
    return drawn.reshape(*batch, *shape)


def factor_names(form: Form, names: tuple[Any, ...]) -> tuple[tuple, tuple]:
    """Returns the mesh axes or logical names of both factors, given those of the kernel."""
    batch, inputs, outputs = _divide(form, names)
    return (*batch, *inputs, None), (*batch, None, *outputs)


def apply_kernel(
    form: Form,
    x: Float[Array, "..."],
    kernel: Float[Array, "..."],
    precision: Any,
    out_sharding: Any = None,
) -> Float[Array, "..."]:
    """Applies the layer without its bias.

    Args:
      form: how the layer contracts its input with the kernel.
      x: the input.
      kernel: the kernel of one layer.
      precision: as in `jax.numpy.einsum`.
      out_sharding: sharding of the result on an Explicit mesh.
    """
    if isinstance(form, Convolution):
        return _sharded(form(x, kernel, precision), out_sharding)
    e = _equation(form, x.ndim)
    equation = f"{e.lhs},{e.kernel}->{e.out}"
    return jnp.einsum(equation, x, kernel, precision=precision, out_sharding=out_sharding)


def apply_factors(
    form: Form,
    x: Float[Array, "..."],
    a: Float[Array, "..."],
    b: Float[Array, "..."],
    precision: Any,
    out_sharding: Any = None,
) -> Float[Array, "..."]:
    """Returns ``(x a) b``, without forming the product of the factors.

    Args:
      form, x, precision, out_sharding: as in `apply_kernel`.
      a, b: the factors of one layer.
    """
    if isinstance(form, Convolution):
        return _sharded(jnp.matmul(form(x, a, precision), b, precision=precision), out_sharding)
    e = _equation(form, x.ndim)
    down = "".join(axis for axis in e.lhs if axis not in e.inputs) + e.rank
    a_axes, b_axes = f"{e.batch}{e.inputs}{e.rank}", f"{e.batch}{e.rank}{e.outputs}"
    hidden = jnp.einsum(f"{e.lhs},{a_axes}->{down}", x, a, precision=precision)
    equation = f"{down},{b_axes}->{e.out}"
    return jnp.einsum(equation, hidden, b, precision=precision, out_sharding=out_sharding)


def kernel_update(
    form: Form, a: Float[Array, "..."], b: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Returns the product of the factors, with the axes of the kernel."""
    if isinstance(form, Convolution):
        return jnp.matmul(a, b, precision="highest")
    e = _equation(form)
    a_axes, b_axes = f"{e.batch}{e.inputs}{e.rank}", f"{e.batch}{e.rank}{e.outputs}"
    return jnp.einsum(f"{a_axes},{b_axes}->{e.kernel}", a, b, precision="highest")


def broadcast_bias(form: Form, bias: jax.Array) -> jax.Array:
    """Returns the bias with axes of length one where only the layer's output has an axis."""
    if not isinstance(form, Einsum):
        return bias  # its axes are the last ones of the output
    after = form.out.rpartition(".")[2]
    sizes = iter(bias.shape)
    return bias.reshape([next(sizes) if axis in form.kernel else 1 for axis in after])


def num_batch_axes(form: Form) -> int:
    """Returns how many axes of the kernel enumerate experts."""
    return len(form.batch) if isinstance(form, Einsum) else 0


def _divide(form: Form, values: tuple[Any, ...]) -> tuple[tuple, tuple, tuple]:
    """Divides one value for each axis of the kernel into batch, input and output axes."""
    if isinstance(form, Convolution):
        return (), values[:-1], values[-1:]
    equation = _equation(form)
    of = dict(zip(equation.kernel, values, strict=True))
    groups = (equation.batch, equation.inputs, equation.outputs)
    batch, inputs, outputs = (tuple(of[axis] for axis in axes) for axes in groups)
    return batch, inputs, outputs


def _sharded(y: jax.Array, out_sharding: Any) -> jax.Array:
    return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)


def _equation(form: Dense | Einsum, dims: int | None = None) -> Einsum:
    return form.einsum(dims) if isinstance(form, Dense) else form
