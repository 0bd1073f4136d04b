"""A compiled training step and evaluation, and the learning-rate schedule.

`Trainer` is independent of the model: it takes any nnx module, a function from (model, batch) to
one loss per example, and a filter that selects the trained parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from loft_jax.sharding import state_shardings

from . import batches, meshes

Loss = Callable[[Any, Any], jax.Array]
"""(model, batch of n examples) -> float32 `(n,)`."""

Outputs = Callable[[Any, Any], Any]
"""(model, batch of n examples) -> an array or a tree of arrays, each `(n, ...)`."""


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """Rises linearly over the first tenth of the steps, then falls linearly to zero."""
    warmup = max(1, round(steps / 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (steps - step) / (steps - warmup)


class TrainState(NamedTuple):
    """The state that changes from step to step: a pytree of arrays, ready for a checkpoint."""

    step: jax.Array
    """Number of updates, int32 scalar; also the position in the data."""
    params: Any
    """The trained parameters, a pure tree of arrays."""
    opt_state: Any


class Trainer:
    """The compiled training step and evaluation of a model.

    The frozen parameters are arguments of the compiled functions. They are not differentiated, and
    there is one copy of them. The learning rate is an argument too, so runs with other learning
    rates or seeds (`start(model)` with new adapters) share the compiled step.

    If the model is on a mesh, the state is on the same mesh, and batches are sharded over it.
    """

    def __init__(
        self,
        model: nnx.Module,
        loss: Loss,
        optimizer: Callable[[Any], optax.GradientTransformation],
        wrt: Any = nnx.LoRAParam,
        outputs: Outputs | None = None,
    ):
        """Splits the model.

        Args:
            model: with all its parameters, frozen ones included.
            loss: its mean over a batch is minimised.
            optimizer: makes the transformation for a learning rate.
            wrt: the nnx filter of the trained parameters.
            outputs: what `evaluate` computes for each example; None for the loss.
        """
        self._graphdef, trained, frozen = nnx.split(model, wrt, ...)
        self.frozen = nnx.as_pure(frozen)
        self._wrt = wrt
        self._mesh = meshes.mesh_of((trained, frozen))  # `trained` alone may be empty

        def evaluate(params: Any, frozen: Any, batch: Any) -> Any:
            return (outputs or loss)(nnx.merge(self._graphdef, params, frozen), batch)

        def mean_loss(params: Any, frozen: Any, batch: Any) -> jax.Array:
            return loss(nnx.merge(self._graphdef, params, frozen), batch).mean()

        def step(state: TrainState, frozen: Any, batch: Any, learning_rate: jax.Array):
            value, gradients = jax.value_and_grad(mean_loss)(state.params, frozen, batch)
            updates, opt_state = optimizer(learning_rate).update(
                gradients, state.opt_state, state.params
            )
            params = optax.apply_updates(state.params, updates)
            return TrainState(state.step + 1, params, opt_state), value

        def start(params: Any) -> TrainState:
            # Copied under jit: the steps donate the state's buffers.
            params = jax.tree.map(jnp.copy, params)
            return TrainState(jnp.zeros([], jnp.int32), params, optimizer(0.0).init(params))

        of_state = whole = None
        if self._mesh is not None:
            params = nnx.as_pure(trained)
            whole = NamedSharding(self._mesh, PartitionSpec())
            of_params = jax.tree.map(lambda x: x.sharding, params)
            of_opt_state = state_shardings(optimizer(0.0), params)
            of_state: Any = TrainState(whole, of_params, of_opt_state)  # pyright: ignore
        self._start = jax.jit(start, out_shardings=of_state)
        self._step = jax.jit(step, donate_argnums=0, out_shardings=(of_state, whole))
        self._evaluate = jax.jit(evaluate, out_shardings=whole)
        self._whole = jax.jit(lambda tree: tree, out_shardings=whole)

    def start(self, model: nnx.Module) -> TrainState:
        """The state before the first step, from the model's current parameters."""
        return self._start(nnx.as_pure(nnx.state(model, self._wrt)))

    def step(
        self, state: TrainState, batch: Any, learning_rate: float
    ) -> tuple[TrainState, jax.Array]:
        """Makes one update; returns the new state and the loss before the update.

        The buffers of `state` are donated: do not use it afterwards.
        """
        return self._step(state, self.frozen, self._put(batch), np.float32(learning_rate))

    def evaluate(self, params: Any, examples: Any, batch_size: int) -> Any:
        """The outputs of each example in host arrays `(n, ...)`, computed in batches."""
        total, found = batches.count(examples), []
        for begin in range(0, total, batch_size):
            # The last batch is padded with other examples, so that all batches have one shape.
            batch = batches.rows(examples, np.arange(begin, begin + batch_size) % total)
            outputs = self._evaluate(params, self.frozen, self._put(batch))
            found.append(batches.rows(jax.tree.map(np.asarray, outputs), slice(total - begin)))
        return jax.tree.map(lambda *parts: np.concatenate(parts), *found)

    def whole(self, params: Any) -> Any:
        """The parameters replicated on every device, so that every process can read them."""
        return self._whole(params)

    def model(self, params: Any) -> Any:
        """The module with these trained parameters."""
        return nnx.merge(self._graphdef, params, self.frozen)

    def _put(self, batch: Any) -> Any:
        if self._mesh is None:
            return batch
        sharding = meshes.batch_sharding(self._mesh, batches.count(batch))
        return jax.tree.map(lambda array: meshes.put(array, sharding), batch)
