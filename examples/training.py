"""A compiled training step and evaluation, the learning-rate schedule, and the losses.

Nothing here knows what the model computes: `Trainer` takes any nnx module and a function from
(model, batch) to one loss per example, and trains the parameters that a filter selects.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import batches
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from loft_jax.sharding import state_shardings

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
    """All that changes from step to step: a pytree of arrays, ready for a checkpoint."""

    step: jax.Array
    """Updates made so far, int32 scalar; also the position in the data."""
    params: Any
    """The trained parameters, a pure tree of arrays."""
    opt_state: Any


class Trainer:
    """A model's compiled training step and evaluation.

    The frozen parameters are arguments of the compiled functions, not differentiated, and kept
    once. The learning rate is an argument too: runs at other rates or from other seeds
    (`start(model)` with newly drawn adapters) share the compiled step.

    Where the model lies on a mesh, the state lies there with it, and batches are split over it.
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
            model: with all its parameters, the frozen ones too.
            loss: what is averaged over a batch and minimised.
            optimizer: makes the transformation for a learning rate.
            wrt: the nnx filter of the parameters to train.
            outputs: what `evaluate` finds of each example; None for the loss.
        """
        self._graphdef, trained, frozen = nnx.split(model, wrt, ...)
        self.frozen = nnx.as_pure(frozen)
        self._wrt = wrt
        self._mesh = meshes.mesh_of((trained, frozen))  # what is trained may be nothing

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
            # Under jit, so that the state owns its buffers: the steps donate them.
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
        """The state before the first step, from the model's present parameters."""
        return self._start(nnx.as_pure(nnx.state(model, self._wrt)))

    def step(
        self, state: TrainState, batch: Any, learning_rate: float
    ) -> tuple[TrainState, jax.Array]:
        """One update and the loss before it; `state`'s buffers are reused: do not keep it."""
        return self._step(state, self.frozen, self._put(batch), np.float32(learning_rate))

    def evaluate(self, params: Any, examples: Any, batch_size: int) -> Any:
        """The outputs of each example, `(n, ...)` arrays on the host, `batch_size` at a time."""
        total, found = batches.count(examples), []
        for begin in range(0, total, batch_size):
            # The last batch is filled up with copies, to keep to one compiled shape.
            batch = batches.rows(examples, np.arange(begin, begin + batch_size) % total)
            outputs = self._evaluate(params, self.frozen, self._put(batch))
            found.append(batches.rows(jax.tree.map(np.asarray, outputs), slice(total - begin)))
        return jax.tree.map(lambda *parts: np.concatenate(parts), *found)

    def whole(self, params: Any) -> Any:
        """These parameters, whole on every device, and so readable by every process."""
        return self._whole(params)

    def _put(self, batch: Any) -> Any:
        if self._mesh is None:
            return batch
        sharding = meshes.batch_sharding(self._mesh, batches.count(batch))
        return jax.tree.map(lambda array: meshes.put(array, sharding), batch)

    def model(self, params: Any) -> Any:
        """The module with these trained parameters."""
        return nnx.merge(self._graphdef, params, self.frozen)


def next_token_loss(model: Any, windows: jax.Array) -> jax.Array:
    """Mean nats a token of each window; int ids `(batch, length + 1)` to float32 `(batch,)`."""
    logits = model(windows[:, :-1]).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
    return losses.mean(axis=-1)
