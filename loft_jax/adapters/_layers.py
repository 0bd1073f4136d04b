"""What an adapter of a linear layer looks like: the shapes of its factors, and its product.

A linear layer contracts its input with a kernel. Each axis of the kernel is an input axis (summed
over), an output axis, or a batch axis, which is in input and output both (one expert each). The
factors of the adapter divide these axes: ``a`` is (*batch, *inputs, rank) and ``b`` is
(*batch, rank, *outputs), each group in the kernel's own order, and their product over the rank has
the kernel's axes. An einsum equation says it for every layer but a convolution, whose ``a`` is
itself the kernel of a convolution to ``rank`` channels.
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
    """A layer ``y = einsum("lhs,kernel->out", x, kernel)``, its letters without spaces.

    Example:
      >>> Einsum("ebd", "edf", "ebf").batch  # of experts
      'e'
    """

    lhs: str
    kernel: str
    out: str

    @property
    def batch(self) -> str:
        """The kernel's axes that both factors have."""
        return "".join(axis for axis in self.kernel if axis in self.lhs and axis in self.out)

    @property
    def inputs(self) -> str:
        """The kernel's axes that are summed over."""
        return "".join(axis for axis in self.kernel if axis not in self.out)

    @property
    def outputs(self) -> str:
        """The kernel's axes that the input does not have."""
        return "".join(axis for axis in self.kernel if axis not in self.lhs)

    @property
    def rank(self) -> str:
        """A letter that is free for the rank."""
        taken = self.lhs + self.kernel + self.out
        return next(axis for axis in reversed(string.ascii_letters) if axis not in taken)


@dataclasses.dataclass(frozen=True)
class Dense:
    """A layer that contracts some axes of its input, and puts new ones last."""

    axes: tuple[int, ...] = (-1,)
    outputs: int = 1

    def einsum(self, dims: int | None = None) -> Einsum:
        """Its equation for an input of so many dimensions; None for enough of them.

        Example:
          >>> Dense(axes=(-1,), outputs=2).einsum(dims=3)
          Einsum(lhs='abc', kernel='cde', out='abde')
        """
        if dims is None:
            dims = len(self.axes) + max(map(abs, self.axes))
        lhs = string.ascii_letters[:dims]
        # The kernel has its input axes in the order of the input, however they were listed.
        contracted = "".join(lhs[axis] for axis in sorted(axis % dims for axis in self.axes))
        new = string.ascii_letters[dims : dims + self.outputs]
        kept = "".join(axis for axis in lhs if axis not in contracted)
        return Einsum(lhs, contracted + new, kept + new)


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A convolution over windows: all but the last axis of its kernel are inputs."""

    kernel_size: tuple[int, ...]
    strides: Any
    padding: Any
    input_dilation: Any
    kernel_dilation: Any

    def __call__(self, x: jax.Array, kernel: jax.Array, precision: Any) -> jax.Array:
        """Flax's layer with that kernel, without a bias."""
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
    """The equation of an einsum layer.

    Raises:
      ValueError: an equation of other than two operands, without ``->``, with an ellipsis or a
        repeated letter in the kernel, or with an axis of the kernel that is summed on its own.
    """
    operands, arrow, out = equation.replace(" ", "").partition("->")
    lhs, comma, kernel = operands.partition(",")
    if not arrow or not comma or "," in kernel:
        raise ValueError(f"the equation {equation!r} is not of the form 'x,kernel->y'")
    if "." in kernel or len(set(kernel)) < len(kernel):
        raise ValueError(f"name each axis of the kernel in {equation!r} with a letter of its own")
    if lost := [axis for axis in kernel if axis not in lhs and axis not in out]:
        raise ValueError(f"{equation!r} sums the kernel's axis {lost[0]!r} before it is used")
    return Einsum(lhs, kernel, out)


def factor_shapes(
    form: Form, kernel: tuple[int, ...], rank: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shapes of the batch axes, and of one ``a`` and one ``b`` without them.

    Raises:
      ValueError: a rank above both dimensions of the kernel.

    Example:
      >>> factor_shapes(parse_einsum("btd,ndh->btnh"), (4, 64, 16), rank=8)
      ((), (64, 8), (8, 4, 16))
    """
    batch, inputs, outputs = _divide(form, kernel)
    limit = max(math.prod(inputs), math.prod(outputs))
    if rank > limit:
        raise ValueError(
            f"rank {rank} is above {limit}, the larger side of a kernel of shape {kernel}"
        )
    return batch, (*inputs, rank), (rank, *outputs)


def draw_factor(
    key: jax.Array, init: Any, shape: tuple[int, ...], dtype: Any, copies: tuple[int, ...] = ()
) -> jax.Array:
    """A new factor (*copies, *shape): each copy is drawn by itself, from its own fan-in."""
    if not copies:
        return init(key, shape, dtype)
    keys = jax.random.split(key, math.prod(copies))
    drawn = jax.vmap(lambda key: init(key, shape, dtype))(keys)
    return drawn.reshape(*copies, *shape)


def factor_names(form: Form, names: tuple[Any, ...]) -> tuple[tuple, tuple]:
    """Mesh axes or logical names of the factors' axes, from those of the kernel's."""
    batch, inputs, outputs = _divide(form, names)
    return (*batch, *inputs, None), (*batch, None, *outputs)


def apply_kernel(
    form: Form,
    x: Float[Array, "..."],
    kernel: Float[Array, "..."],
    precision: Any,
    out_sharding: Any = None,
) -> Float[Array, "..."]:
    """The layer without its bias; `out_sharding` for Explicit meshes, as layers of nnx take it."""
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
    """``(x a) b``: first down to the rank, then up. The product of the factors is not formed."""
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
    """The product of the factors, with the axes of the kernel."""
    if isinstance(form, Convolution):
        return jnp.matmul(a, b, precision="highest")
    e = _equation(form)
    a_axes, b_axes = f"{e.batch}{e.inputs}{e.rank}", f"{e.batch}{e.rank}{e.outputs}"
    return jnp.einsum(f"{a_axes},{b_axes}->{e.kernel}", a, b, precision="highest")


def broadcast_bias(form: Form, bias: jax.Array) -> jax.Array:
    """The bias with axes of length one where the layer's output has others between its own."""
    if not isinstance(form, Einsum):
        return bias  # its axes are the last of the output
    after = form.out.rpartition(".")[2]
    sizes = iter(bias.shape)
    return bias.reshape([next(sizes) if axis in form.kernel else 1 for axis in after])


def _divide(form: Form, values: tuple[Any, ...]) -> tuple[tuple, tuple, tuple]:
    """What each axis of the kernel has, divided into batch, input and output axes."""
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
