"""Adapters on the layers of a linen model."""

import contextlib
import dataclasses
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

ADAPTED = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv)


@dataclasses.dataclass(frozen=True)
class LoraModel:
    """A linen model with adapters on the layers that the rules match.

    Its parameters are the model's own, at the same paths, and beside each adapted ``kernel`` the
    factors ``lora_a`` (*batch, *inputs, rank) and ``lora_b`` (*batch, rank, *outputs): (in, rank)
    and (rank, out) for `nn.Dense`. Adapted are `nn.Dense`, `nn.DenseGeneral` (and so attention),
    `nn.Einsum` and `nn.Conv`; under `nn.scan` and `nn.vmap` the factors are stacked on the axis
    on which the other parameters are, and they are partitioned as the kernel is.

    It is no module itself but stands where one is initialized and applied, so that no path
    changes. Dropout is on where `apply` is given an rng named "dropout", and off where it is not;
    an `nn.scan` must have it among its ``split_rngs``, or its layers are not given it.

    Attributes:
      model: a linen module.
      rules: which layers, and the rank, scale, dropout, initializers and dtype of their adapters.
        The first rule that matches a layer's path counts.

    Example:
      >>> from loft_jax import loft_adamw
      >>> from loft_jax.adapters import join, lora_pairs, split
      >>> rule = LoraRule(path="layers_0", rank=2, alpha=4)
      >>> model = LoraModel(nn.Sequential([nn.Dense(5), nn.relu]), rule)
      >>> params = model.init(jax.random.key(0), jnp.ones((1, 6)))["params"]
      >>> jax.tree.map(jnp.shape, params["layers_0"])
      {'bias': (5,), 'kernel': (6, 5), 'lora_a': (6, 2), 'lora_b': (2, 5)}
      >>> adapter, base = split(params)
      >>> tx = loft_adamw(1e-3, pairs=lora_pairs(rule))
      >>> state = tx.init(adapter)
      >>> y = model.apply({"params": join(adapter, base)}, jnp.ones((1, 6)))
    """

    model: nn.Module
    rules: Rules

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """`nn.Module.init`: the variables, factors among the "params".

        Raises:
          ValueError: a rule that no layer follows, a rank that does not fit, or a layer that
            cannot be adapted; the message names the layer.
        """
        with adapt(self.rules):
            return self.model.init(rngs, *args, **kwargs)

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """`nn.Module.apply`, with any `method`; errors as in `init`."""
        with adapt(self.rules):
            return self.model.apply(variables, *args, **kwargs)


@contextlib.contextmanager
def adapt(rules: Rules) -> Iterator[None]:
    """Within it, the layers of any linen model that the rules match have adapters.

    What `LoraModel` is made of, for models that are not used through `init` and `apply`. It acts
    where a function is traced: one that was jitted and called before keeps its trace.

    Args:
      rules: as in `LoraModel`.

    Raises:
      ValueError: at the end of an initialization, a rule that no layer has followed.

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
    initializing = False
    inside = False  # an adapter, which may be made of layers itself

    def intercept(
        call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        module = context.module
        nonlocal initializing, inside
        initializing |= module.is_initializing()
        if inside or not isinstance(module, ADAPTED) or context.method_name != "__call__":
            return call(*args, **kwargs)
        path = "/".join(module.path)
        seen.append(path)
        if (rule := rule_for(path, rules)) is None:
            return call(*args, **kwargs)
        used.append(rule)
        y = call(*args, **kwargs)
        inside = True
        try:
            return y + _low_rank(module, rule, y.dtype, *args, **kwargs)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        finally:
            inside = False

    with nn.intercept_methods(intercept):
        yield
    if initializing:  # `apply` may use a part of the model only
        check_all_used(rules, used, seen)


def _low_rank(
    module: Any, rule: LoraRule, dtype: Any, inputs: jax.Array, *args: Any, **kwargs: Any
) -> jax.Array:
    """The adapter's part of the layer's output; makes its factors in `init`."""
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
        # The kernel's kind of box, which may be of logical names or have a mesh.
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
    """How the layer, called with these arguments beside its input, contracts it."""
    if isinstance(module, nn.Dense):
        return Dense()
    if isinstance(module, nn.DenseGeneral):
        if module.batch_dims:
            raise ValueError("an nn.DenseGeneral with batch_dims: write it as an nn.Einsum")
        axes = (module.axis,) if isinstance(module.axis, int) else tuple(module.axis)
        return Dense(axes, 1 if isinstance(module.features, int) else len(module.features))
    if isinstance(module, nn.Einsum):
        equation = einsum_str or module.einsum_str
        assert equation is not None  # or the layer itself has complained
        return parse_einsum(equation)
    if module.feature_group_count != 1 or module.mask is not None:
        raise ValueError("a grouped or masked convolution is no product of two factors")
    size = module.kernel_size
    return Convolution(
        (size,) if isinstance(size, int) else tuple(size),
        module.strides,
        module.padding,
        module.input_dilation,
        module.kernel_dilation,
    )
