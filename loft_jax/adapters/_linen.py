"""Adds adapters to the layers of a linen model."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from loft_jax.adapters._layers import (
    Convolution,
    Dense,
    Form,
    apply_factors,
    draw_factor,
    factor_names,
    factor_shapes,
    parse_einsum,
)
from loft_jax.adapters._rule import LoraRule, Rules, as_rules, check_all_used, rule_for
from loft_jax.pairs.declared import declare_batch, declare_scale

ADAPTED = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv)


@dataclasses.dataclass(frozen=True)
class LoraModel:
    """A linen model with adapters on the layers that the rules match.

    The parameters keep their paths. Next to each adapted ``kernel`` are the factors ``lora_a`` of
    shape ``(*batch, *inputs, rank)`` and ``lora_b`` of shape ``(*batch, rank, *outputs)``; for
    `nn.Dense` these are (in, rank) and (rank, out). Supported layers are `nn.Dense`,
    `nn.DenseGeneral` (so also attention), `nn.Einsum` and `nn.Conv`. Under `nn.scan` and `nn.vmap`
    the factors are stacked on the same axis as the other parameters. They are partitioned like
    their kernel.

    A `LoraModel` is not a module. It has the `init` and `apply` of one, so that no path changes.
    Dropout is on if `apply` gets an rng named "dropout", and off otherwise. An `nn.scan` passes
    that rng on only if ``split_rngs`` contains it.

    Attributes:
      model: a linen module.
      rules: the layers to adapt, with rank, scale, dropout, initializers and dtype. The first rule
        that matches a layer's path is used.

    Example:
      >>> from loft_jax import loft_adamw
      >>> from loft_jax.adapters import join, split
      >>> rule = LoraRule(path="layers_0", rank=2, alpha=4)
      >>> model = LoraModel(nn.Sequential([nn.Dense(5), nn.relu]), rule)
      >>> params = model.init(jax.random.key(0), jnp.ones((1, 6)))["params"]
      >>> jax.tree.map(jnp.shape, params["layers_0"])
      {'bias': (5,), 'kernel': (6, 5), 'lora_a': (6, 2), 'lora_b': (2, 5)}
      >>> adapter, base = split(params)
      >>> tx = loft_adamw(1e-3, pairs=rule)
      >>> state = tx.init(adapter)
      >>> y = model.apply({"params": join(adapter, base)}, jnp.ones((1, 6)))
    """

    model: nn.Module
    rules: Rules

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """Initializes the variables of the model and the factors, as `nn.Module.init`.

        Args:
          rngs: a key, or keys by name.
          *args, **kwargs: arguments of the model.

        Returns:
          The variables. The factors are in the collection "params".

        Raises:
          ValueError: a rule matches no layer, the rank is too high, or a layer cannot be adapted.
            The message names the layer.
        """
        with adapt(self.rules):
            return self.model.init(rngs, *args, **kwargs)

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Applies the adapted model, as `nn.Module.apply`.

        Args:
          variables: as `init` returns them.
          *args, **kwargs: arguments of the model, and of `nn.Module.apply` such as `rngs` and
            `method`.

        Returns:
          The output of the model, and the updated variables if `mutable` is given.

        Raises:
          ValueError: as `init`.
        """
        with adapt(self.rules):
            return self.model.apply(variables, *args, **kwargs)


@contextlib.contextmanager
def adapt(rules: Rules) -> Iterator[None]:
    """A context in which the matching layers of any linen model have adapters.

    `LoraModel` is built on it. Use it for models that are not called through `init` and `apply`. It
    takes effect when a function is traced; a jitted function that was called before keeps its
    earlier trace.

    Args:
      rules: as in `LoraModel`.

    Returns:
      A context manager.

    Raises:
      ValueError: at the end of an initialization, if a rule has matched no layer.

    Example:
      >>> model = nn.Dense(5)
      >>> with adapt(LoraRule(path="", rank=2)):
      ...     params = model.init(jax.random.key(0), jnp.ones((1, 6)))
      >>> sorted(params["params"])
      ['bias', 'kernel', 'lora_a', 'lora_b']
    """
    rules = as_rules(rules)
    used: list[LoraRule] = []
    seen: list[str] = []
    others: dict[str, str] = {}
    initializing = False
    inside = False  # an adapter, which may itself consist of layers

    def intercept(
        call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        module = context.module
        nonlocal initializing, inside
        initializing |= module.is_initializing()
        if inside or not isinstance(module, ADAPTED) or context.method_name != "__call__":
            if not inside and not isinstance(module, ADAPTED) and module.scope is not None:
                others["/".join(module.path)] = type(module).__name__
            return call(*args, **kwargs)
        path = "/".join(module.path)
        seen.append(path)
        if (rule := rule_for(path, rules)) is None:
            return call(*args, **kwargs)
        used.append(rule)
        declare_scale(f"(?:params/)?{_path_of_a(path)}", rule.scale)
        if rule.batch is not None:  # the layer does not know on which axis a scan stacks it
            declare_batch(f"(?:params/)?{_path_of_a(path)}", rule.batch)
        y = call(*args, **kwargs)
        inside = True
        try:
            return y + _low_rank(module, rule, y.dtype, *args, **kwargs)
        except ValueError as error:
            raise ValueError(f"{path or 'the model'}: {error}") from error
        finally:
            inside = False

    with nn.intercept_methods(intercept):
        yield
    if initializing:  # `apply` may call only a part of the model
        check_all_used(rules, used, seen, others)


def _path_of_a(layer: str) -> str:
    return re.escape(f"{layer}/lora_a" if layer else "lora_a")


def _low_rank(
    module: Any, rule: LoraRule, dtype: Any, inputs: jax.Array, *args: Any, **kwargs: Any
) -> jax.Array:
    """Returns the adapter's part of the layer's output; creates the factors in `init`."""
    x = jnp.asarray(inputs)
    form = _form_of(module, *args, **kwargs)
    boxed = module.get_variable("params", "kernel")
    kernel = nn.meta.unbox(boxed)
    names = boxed.names if isinstance(boxed, nn.Partitioned) else (None,) * kernel.ndim
    names_a, names_b = factor_names(form, names)
    batch, shape_a, shape_b = factor_shapes(form, kernel.shape, rule.rank)

    def factor(name: str, init: Any, shape: tuple[int, ...], names: tuple) -> jax.Array:
        draw = lambda key: draw_factor(key, init, shape, rule.dtype, batch)
        if not isinstance(boxed, nn.Partitioned):
            return module.param(name, draw)
        # The same class of box as the kernel's, which may hold logical names or a mesh.
        return module.param(name, lambda key: boxed.replace(value=draw(key), names=names))

    a = factor("lora_a", rule.init_a, shape_a, names_a)
    b = factor("lora_b", rule.init_b, shape_b, names_b)
    if rule.dropout and module.has_rng("dropout"):
        keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - rule.dropout, x.shape)
        x = jnp.where(keep, x / (1 - rule.dropout), 0)
    x, a, b = (v.astype(dtype) for v in (x, a, b))
    product = apply_factors(form, x, a, b, module.precision)
    return jnp.asarray(rule.scale, dtype) * product


def _form_of(module: Any, einsum_str: str | None = None) -> Form:
    """Returns how the layer contracts its input, given the other arguments of its call."""
    if isinstance(module, nn.Dense):
        return Dense()
    if isinstance(module, nn.DenseGeneral):
        if module.batch_dims:
            raise ValueError(
                "an nn.DenseGeneral with batch_dims is not supported. Use an nn.Einsum instead"
            )
        axes = (module.axis,) if isinstance(module.axis, int) else tuple(module.axis)
        return Dense(axes, 1 if isinstance(module.features, int) else len(module.features))
    if isinstance(module, nn.Einsum):
        equation = einsum_str or module.einsum_str
        assert equation is not None  # otherwise the layer itself has raised
        return parse_einsum(equation)
    if module.feature_group_count != 1 or module.mask is not None:
        raise ValueError("a grouped or masked convolution is not supported")
    size = module.kernel_size
    return Convolution(
        (size,) if isinstance(size, int) else tuple(size),
        module.strides,
        module.padding,
        module.input_dilation,
        module.kernel_dilation,
    )
