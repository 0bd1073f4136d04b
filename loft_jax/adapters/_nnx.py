"""Adapters on the layers of an nnx model: put on, and taken off."""

import functools
from collections.abc import Sequence
from typing import Any

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


class LoraLayer(nnx.Module):
    """A layer with an adapter beside it: ``base(x) + scale * (dropout(x) @ a) @ b``.

    Made by `add_lora`. Its parameters lie at ``base/...``, ``lora_a`` and ``lora_b``.

    Attributes:
      base: the layer, as it was.
      lora_a: (*stack, *batch, *inputs, rank), an `nnx.LoRAParam`.
      lora_b: (*stack, *batch, rank, *outputs), likewise. For `nnx.Linear` that is (in, rank) and
        (rank, out); for a convolution (*window, in, rank) and (rank, out); for layers with heads
        or experts the axes of the kernel stand in place of in and out. Axes on which a scan or a
        vmap has stacked the layer are where they are in the kernel.
      scale: the adapter's own factor.
      dropout: an `nnx.Dropout`, which `model.train()` and `model.eval()` switch, or None.
    """

    def __init__(self, base: Any, rule: LoraRule, *, rngs: nnx.Rngs):
        """Draws new factors for `base` by `rule` from the streams `params` and `dropout`."""
        check_own_call(base)
        form, stack = form_of(base), stacked_axes(base, rule.batch)
        sizes = tuple(base.kernel.get_value().shape[axis] for axis in stack)
        batch, shape_a, shape_b = factor_shapes(form, single_shape(base), rule.rank)
        copies = (*sizes, *batch)
        if rule.batch is not None and len(rule.batch) != len(copies):
            raise ValueError(
                f"batch={rule.batch}, but {len(stack)} axes of stacked layers and {len(batch)} of "
                "experts: name all of them, stacks first, or use a rule for each kind of layer"
            )
        a = draw_factor(rngs.params(), rule.init_a, shape_a, rule.dtype, copies)
        b = draw_factor(rngs.params(), rule.init_b, shape_b, rule.dtype, copies)
        names_a, names_b = _names(form, base.kernel, stack)
        self.base = base
        self.lora_a = _factor(a, stack, names_a)
        self.lora_b = _factor(b, stack, names_b)
        self.scale = rule.scale
        self.form = form
        self.stack = stack
        self.dropout = _dropout(rule.dropout, rngs, sizes) if rule.dropout else None

    def __call__(self, x: jax.Array, *, out_sharding: Any = None) -> jax.Array:
        """The base layer's input and result, in the dtype of the base layer's output."""
        y = self.base(x, out_sharding=out_sharding)
        x = x if self.dropout is None else self.dropout(x)
        x, a, b = (v.astype(y.dtype) for v in (x, self.lora_a[...], self.lora_b[...]))
        low_rank = apply_factors(self.form, x, a, b, self.base.precision, out_sharding)
        return y + jnp.asarray(self.scale, y.dtype) * low_rank

    def kernel_update(self) -> jax.Array:
        """``scale * a @ b`` with the axes and the dtype of the base layer's kernel."""
        kernel = self.base.kernel
        product = functools.partial(kernel_update, self.form)
        for axis in self.stack:  # the outermost map is over the last axis, and leaves the others
            product = jax.vmap(product, in_axes=axis, out_axes=axis)
        wide = jnp.promote_types(kernel.dtype, jnp.float32)
        a, b = self.lora_a[...].astype(wide), self.lora_b[...].astype(wide)
        return (self.scale * product(a, b)).astype(kernel.dtype)


def add_lora(model: Any, rules: Rules, *, rngs: nnx.Rngs) -> Any:
    """Puts adapters on the layers of a model.

    Adapted are `nnx.Linear`, `nnx.LinearGeneral` (and so attention), `nnx.Einsum` and `nnx.Conv`,
    wherever they lie in the model, stacked by `nnx.vmap` or `nnx.scan` or not. Quantize the base
    with `quantize` before or after.

    Args:
      model: an nnx module. It is left as it is; the result shares its variables.
      rules: which layers, and their rank, scale, dropout, initializers and dtype. The first rule
        that matches a layer counts.
      rngs: streams `params` for the factors, and `dropout` where a rule asks for it. Dropout is
        on until `model.eval()` is called on the result; a layer's own ``deterministic=`` argument
        does not reach it.

    Returns:
      The model with a `LoraLayer` in place of each layer that a rule matches. The adapters'
      parameters are its `nnx.LoRAParam`, the frozen base all its others.

    Raises:
      ValueError: a rule that no layer follows, a rank that does not fit, a layer that cannot be
        adapted (an `nnx.Einsum` without an equation, a grouped or masked convolution), a layer
        that has an adapter already, or axes of a stack that the shapes leave in doubt. The
        message names the layer.

    Example:
      >>> from loft_jax import loft_adamw
      >>> from loft_jax.adapters import lora_pairs
      >>> model = nnx.Sequential(nnx.Linear(6, 5, rngs=nnx.Rngs(0)), nnx.relu)
      >>> rule = LoraRule(path="layers/0", rank=2, alpha=4)
      >>> model = add_lora(model, rule, rngs=nnx.Rngs(1))
      >>> tx = loft_adamw(1e-3, pairs=lora_pairs(rule))
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
      >>> [v.shape for _, v in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))]
      [(6, 2), (2, 5)]
    """
    rules = as_rules(rules)
    used: list[LoraRule] = []
    seen: list[str] = []
    adapted = {
        (*path, "base") for path, node in nnx.iter_modules(model) if isinstance(node, LoraLayer)
    }

    def wrap(path: tuple[Any, ...], node: Any) -> Any:
        if not isinstance(node, (*PLAIN, QuantizedLayer)):
            return node
        name = "/".join(map(str, path))
        seen.append(name)
        if (rule := rule_for(name, rules)) is None:
            return node
        if path in adapted or isinstance(node, nnx.LoRALinear):
            raise ValueError(f"{name} has an adapter already: merge or remove it first")
        used.append(rule)
        try:
            return LoraLayer(node, rule, rngs=rngs)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    result = nnx.recursive_map(wrap, model)
    check_all_used(rules, used, seen)
    return result


def remove_lora(model: Any, *, merge: bool) -> Any:
    """Takes the adapters of `add_lora` off a model.

    Args:
      model: it is left as it is.
      merge: whether each adapter's product is added to its layer's kernel (in the kernel's dtype),
        so that the plain model computes what the adapted one did. Without it the plain model is
        the pretrained one.

    Returns:
      The model with its own layers again. Without `merge` it shares the model's variables.

    Raises:
      ValueError: there is no adapter, or one to be merged lies on a quantized kernel.

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
                f"{'/'.join(map(str, path))}: an adapter is not merged into a quantized kernel, "
                "whose steps are larger than it. Keep it beside, or merge it into the "
                "unquantized weights"
            )
        base = nnx.clone(node.base)
        base.kernel[...] = base.kernel[...] + node.kernel_update()
        return base

    plain = nnx.recursive_map(unwrap, model)
    if not removed:
        raise ValueError("the model has no adapter of add_lora to remove")
    return plain


def _factor(value: jax.Array, stack: Sequence[int], names: tuple | None) -> nnx.LoRAParam:
    """The variable, with the axes of the stack (first in `value`) where the kernel has them."""
    value = jnp.moveaxis(value, range(len(stack)), stack)
    return nnx.LoRAParam(value) if names is None else nnx.LoRAParam(value, out_sharding=names)


def _names(form: Form, kernel: Any, stack: Sequence[int]) -> tuple[Any, Any]:
    """The factors' axis names, where the kernel has some: they are sharded as it is."""
    names = kernel.get_metadata().get("out_sharding")
    if names is None:
        return None, None
    names = (*names, *(None for _ in range(kernel.get_value().ndim - len(names))))
    single = tuple(name for axis, name in enumerate(names) if axis not in stack)
    with_stack = []
    for factor in factor_names(form, single):
        factor = list(factor)
        for axis in stack:
            factor.insert(axis, names[axis])
        with_stack.append(tuple(factor))
    return tuple(with_stack)  # pyright: ignore[reportReturnType]  # always two


def _dropout(rate: float, rngs: nnx.Rngs, stack: tuple[int, ...]) -> Any:
    """A dropout whose keys are stacked like the layer, so that each has masks of its own."""
    make = lambda key: nnx.Dropout(rate, rngs=nnx.Rngs(dropout=key))
    for _ in stack:
        make = nnx.vmap(make)
    key = rngs.dropout()
    return make(jax.random.split(key, stack) if stack else key)
