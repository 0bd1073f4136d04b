"""LoRA-GA on a whole model: the gradient of the adapted weights initializes the factors."""

import functools
from typing import Any

import jax
from flax import nnx

from examples.common.training import Loss
from loft_jax.adapters import LoraRule
from loft_jax.baselines import lora_ga_init

ITERATIONS = 4
"""Iterations of the randomized singular value decomposition; exact ones take minutes."""


def lora_ga(model: Any, loss: Loss, batch: Any, rule: LoraRule) -> Any:
    """Returns the model with LoRA-GA's factors, and residuals in place of the frozen weights.

    The result computes the same function as `model`, which is not changed.

    Args:
        model: a model with new adapters of `add_lora` on kernels `(in, out)`, or on
            `(layers, in, out)` of stacked layers.
        loss: the objective, a loss for each example.
        batch: the examples of the gradient.
        rule: the rule of the adapters.
    """
    is_adapted = lambda path, _: tuple(path[-2:]) == ("base", "kernel")
    graphdef, kernels, factors, rest = nnx.split(model, is_adapted, nnx.LoRAParam, ...)

    @jax.jit
    def gradient(kernels: nnx.State, factors: nnx.State, rest: nnx.State) -> nnx.State:
        def mean_loss(kernels: nnx.State) -> jax.Array:
            found = loss(nnx.merge(graphdef, kernels, factors, rest), batch)
            # A loss may come with weights, see `examples.common.training.Loss`.
            return found[0].sum() / found[1].sum() if isinstance(found, tuple) else found.mean()

        return jax.grad(mean_loss)(kernels)

    gradients = dict(nnx.to_flat_state(gradient(kernels, factors, rest)))
    flat_kernels, flat_factors = (dict(nnx.to_flat_state(x)) for x in (kernels, factors))
    init = functools.partial(lora_ga_init, rank=rule.rank, scale=rule.scale, iterations=ITERATIONS)
    for path, kernel in flat_kernels.items():
        one = jax.jit(jax.vmap(init) if kernel[...].ndim == 3 else init)
        started = one(kernel[...], gradients[path][...])
        flat_kernels[path] = kernel.replace(started.residual)
        for name, value in (("lora_a", started.a), ("lora_b", started.b)):
            place = (*path[:-2], name)
            flat_factors[place] = flat_factors[place].replace(value)
    states = (nnx.from_flat_state(flat) for flat in (flat_kernels, flat_factors))
    return nnx.merge(graphdef, *states, rest)
