"""Adds adapters to the layers of an nnx model, and removes them."""

import functools
import re
from collections.abc import Sequence
from typing import Any, TypeVar, overload

import jax
import jax.numpy as jnp
from flax import nnx

from loft_jax.adapters._layers import (
    Form,
    apply_factors,
    draw_factor,
    factor_names,
    factor_shapes,
    kernel_update,
    num_batch_axes,
)
from loft_jax.adapters._nnx_layers import (
    PLAIN,
    QuantizedLayer,
    check_own_call,
    form_of,
    single_shape,
    stacked_axes,
)
from loft_jax.adapters._rule import LoraRule, Rules, as_rules, check_all_used, rule_for
from loft_jax.pairs.declared import declare_batch, declare_scale

Model = TypeVar("Model", bound=nnx.Module)


class LoraLayer(nnx.Module):
    """A layer and its adapter: ``base(x) + scale * (dropout(x) @ a) @ b``.

    `add_lora` makes these. The parameters are at ``base/...``, ``lora_a`` and ``lora_b``.

    Attributes:
      base: the original layer.
      lora_a: an `nnx.LoRAParam` of shape ``(*stack, *batch, *inputs, rank)``.
      lora_b: an `nnx.LoRAParam` of shape ``(*stack, *batch, rank, *outputs)``. For `nnx.Linear` the
        shapes are (in, rank) and (rank, out); for a convolution ``(*window, in, rank)`` and
        (rank, out). Layers with heads or experts have several axes in place of in or out, as their
        kernel does. Axes of layers stacked by a scan or a vmap are in the same positions as in the
        kernel.
      scale: the adapter's own scale.
      dropout: an `nnx.Dropout`, which `model.train()` and `model.eval()` switch on and off; None
        without dropout.

    Example:
      >>> layer = LoraLayer(nnx.Linear(6, 5, rngs=nnx.Rngs(0)), LoraRule(path="", rank=2),
      ...                   rngs=nnx.Rngs(1))
      >>> layer.lora_a.shape, layer(jnp.ones((1, 6))).shape
      ((6, 2), (1, 5))
    """

    def __init__(self, base: Any, rule: LoraRule, *, rngs: nnx.Rngs):
        """Draws new factors for a layer.

        Args:
          base: the layer.
          rule: the rank, scale, dropout and initialization.
          rngs: streams `params` and, with dropout, `dropout`.

        Raises:
          ValueError: as `add_lora`.
        """
        check_own_call(base)
        form, stack = form_of(base), stacked_axes(base, rule.batch)
        sizes = tuple(base.kernel.get_value().shape[axis] for axis in stack)
        batch, shape_a, shape_b = factor_shapes(form, single_shape(base), rule.rank)
        stacked = (*sizes, *batch)
        if rule.batch is not None and len(rule.batch) != len(stacked):
            raise ValueError(
                f"batch={rule.batch} has {len(rule.batch)} axes, but the kernel has {len(stack)} "
                f"axes of stacked layers and {len(batch)} axes of experts. List all of them, "
                "stacked layers first, or use one rule for each kind of layer"
            )
        a = draw_factor(rngs.params(), rule.init_a, shape_a, rule.dtype, stacked)
        b = draw_factor(rngs.params(), rule.init_b, shape_b, rule.dtype, stacked)
        names_a, names_b = _names(form, base.kernel, stack)
        self.base = base
        self.lora_a = _factor(a, stack, names_a)
        self.lora_b = _factor(b, stack, names_b)
        self.scale = rule.scale
        self.form = form
        self.stack = stack
        self.dropout = _dropout(rule.dropout, rngs, sizes) if rule.dropout else None

    def __call__(self, x: jax.Array, *, out_sharding: Any = None) -> jax.Array:
        """Applies the layer and its adapter.

        Args:
          x: the input of the base layer.
          out_sharding: sharding of the result on an Explicit mesh, as in Flax's own layers.

        Returns:
          The sum, in the dtype of the base layer's output.
        """
        y = self.base(x, out_sharding=out_sharding)
        x = x if self.dropout is None else self.dropout(x)
        x, a, b = (v.astype(y.dtype) for v in (x, self.lora_a[...], self.lora_b[...]))
        low_rank = apply_factors(self.form, x, a, b, self.base.precision, out_sharding)
        return y + jnp.asarray(self.scale, y.dtype) * low_rank

    def kernel_update(self) -> jax.Array:
        """Returns ``scale * a @ b`` with the axes and the dtype of the base layer's kernel."""
        kernel = self.base.kernel
        product = functools.partial(kernel_update, self.form)
        for axis in self.stack:  # the last map is the outermost, so the other axes keep their index
            product = jax.vmap(product, in_axes=axis, out_axes=axis)
        wide = jnp.promote_types(kernel.dtype, jnp.float32)
        a, b = self.lora_a[...].astype(wide), self.lora_b[...].astype(wide)
        return (self.scale * product(a, b)).astype(kernel.dtype)

    @property
    def batch_axes(self) -> tuple[int, ...]:
        """The axes of both factors that enumerate stacked layers or experts."""
        ndim = self.lora_a.get_value().ndim
        others = [axis for axis in range(ndim) if axis not in self.stack]
        return *self.stack, *others[: num_batch_axes(self.form)]


def add_lora(model: Model, rules: Rules, *, rngs: nnx.Rngs) -> Model:
    """Adds adapters to the layers of a model.

    Supported layers are `nnx.Linear`, `nnx.LinearGeneral` (so also attention), `nnx.Einsum` and
    `nnx.Conv`, anywhere in the model and also when stacked by `nnx.vmap` or `nnx.scan`. To
    quantize the base, call `quantize` before or after.

    Args:
      model: an nnx module. It is not modified; the result shares its variables.
      rules: the layers to adapt, with rank, scale, dropout, initializers and dtype. The first rule
        that matches a layer is used.
      rngs: the stream `params` for the factors and, for rules with dropout, `dropout`. Dropout is
        on until `model.eval()` is called on the result. A ``deterministic=`` argument of the
        layer does not affect it.

    Returns:
      The model with a `LoraLayer` in place of each matching layer; a `LoraLayer` if the model
      itself is such a layer. Its `nnx.LoRAParam` variables are the adapters, all others the
      frozen base.

    Raises:
      ValueError: a rule matches no layer, the rank is too high, a layer cannot be adapted (an
        `nnx.Einsum` without an equation, a grouped or masked convolution), a layer already has
        an adapter, or the stacked axes are ambiguous. The message names the layer.

    Example:
      >>> from loft_jax import loft_adamw
      >>> model = nnx.Sequential(nnx.Linear(6, 5, rngs=nnx.Rngs(0)), nnx.relu)
      >>> rule = LoraRule(path="layers/0", rank=2, alpha=4)
      >>> model = add_lora(model, rule, rngs=nnx.Rngs(1))
      >>> tx = loft_adamw(1e-3, pairs=rule)
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
      >>> [v.shape for _, v in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))]
      [(6, 2), (2, 5)]
    """
    rules = as_rules(rules)
    used: list[LoraRule] = []
    seen: list[str] = []
    others: dict[str, str] = {}
    made: dict[str, LoraLayer] = {}
    adapted = {
        (*path, "base") for path, node in nnx.iter_modules(model) if isinstance(node, LoraLayer)
    }

    def wrap(path: tuple[Any, ...], node: Any) -> Any:
        name = "/".join(map(str, path))
        if not isinstance(node, (*PLAIN, QuantizedLayer)):
            others[name] = type(node).__name__
            return node
        seen.append(name)
        if (rule := rule_for(name, rules)) is None:
            return node
        if path in adapted or isinstance(node, nnx.LoRALinear):
            raise ValueError(
                f"{name or 'the model'} already has an adapter. Merge or remove it first"
            )
        used.append(rule)
        try:
            made[name] = LoraLayer(node, rule, rngs=rngs)
        except ValueError as error:
            raise ValueError(f"{name or 'the model'}: {error}") from error
        return made[name]

    result = nnx.recursive_map(wrap, model)
    check_all_used(rules, used, seen, others)
    for name, layer in made.items():
        path = re.escape(f"{name}/lora_a" if name else "lora_a")
        declare_scale(path, layer.scale)
        declare_batch(path, layer.batch_axes)
    return result


@overload
def remove_lora(model: LoraLayer, *, merge: bool) -> Any: ...


@overload
def remove_lora(model: Model, *, merge: bool) -> Model: ...


def remove_lora(model: Any, *, merge: bool) -> Any:
    """Removes the adapters that `add_lora` has added.

    Args:
      model: an adapted model. It is not modified.
      merge: True adds each adapter's product to its layer's kernel, in the kernel's dtype, so that
        the plain model computes the same as the adapted one. False returns the pretrained model.

    Returns:
      The model with its original layers. With ``merge=False`` it shares the variables of `model`.

    Raises:
      ValueError: the model has no adapter, or one to be merged is on a quantized kernel.

    Example:
      >>> model = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
      >>> adapted = add_lora(model, LoraRule(path="", rank=2), rngs=nnx.Rngs(1))
      >>> type(remove_lora(adapted, merge=True)).__name__
      'Linear'
    """
    removed = 0

    def unwrap(path: tuple[Any, ...], node: Any) -> Any:
        nonlocal removed
        if not isinstance(node, LoraLayer):
            return node
        removed += 1
        if not merge:
            return node.base
        if isinstance(node.base, QuantizedLayer):
            raise ValueError(
                f"{'/'.join(map(str, path)) or 'the model'}: an adapter cannot be merged into a "
                "quantized kernel, because it is smaller than the quantization steps. Keep it "
                "separate, or merge it into the unquantized weights"
            )
        base = nnx.clone(node.base)
        base.kernel[...] = base.kernel[...] + node.kernel_update()
        return base

    plain = nnx.recursive_map(unwrap, model)
    if not removed:
        raise ValueError("the model has no adapter that add_lora has added")
    return plain


def _factor(value: jax.Array, stack: Sequence[int], names: tuple | None) -> nnx.LoRAParam:
    """Returns the variable; the stacked axes, first in `value`, go to the kernel's positions."""
    value = jnp.moveaxis(value, range(len(stack)), stack)
    return nnx.LoRAParam(value) if names is None else nnx.LoRAParam(value, out_sharding=names)


def _names(form: Form, kernel: Any, stack: Sequence[int]) -> tuple[tuple | None, tuple | None]:
    """Returns the axis names of the factors, so that they are sharded like the kernel."""
    names = kernel.get_metadata().get("out_sharding")
    if names is None:
        return None, None
    names = (*names, *(None for _ in range(kernel.get_value().ndim - len(names))))
    single = tuple(name for axis, name in enumerate(names) if axis not in stack)

    def with_stack(factor: Sequence[Any]) -> tuple[Any, ...]:
        factor = list(factor)
        for axis in stack:
            factor.insert(axis, names[axis])
        return tuple(factor)

    names_a, names_b = factor_names(form, single)
    return with_stack(names_a), with_stack(names_b)


def _dropout(rate: float, rngs: nnx.Rngs, stack: tuple[int, ...]) -> nnx.Dropout:
    """Returns a dropout whose keys are stacked like the layer, so that the layers' masks differ."""
    make = lambda key: nnx.Dropout(rate, rngs=nnx.Rngs(dropout=key))
    for _ in stack:
        make = nnx.vmap(make)
    key = rngs.dropout()
    return make(jax.random.split(key, stack) if stack else key)
