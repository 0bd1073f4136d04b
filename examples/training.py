"""The training loop's parts: optimizers by name, a learning-rate schedule, compiled steps.

Nothing here knows what the model computes: `Trainer` takes any nnx module and a function from
(model, batch) to one loss per example, and trains the parameters that a filter selects.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import loft_jax
from loft_jax.sharding import state_shardings

METHODS = ("loft", "lora", "full")
LEARNING_RATES = {"loft": 5e-4, "lora": 3e-3, "full": 1e-4}
"""Peak rates: for loft and lora the best of those tried in 25 steps of `finetune_llm.py`'s
default run (loft 5e-4, 1e-3, 4e-3; lora 3e-3, 1e-2); for full the only one tried."""

Loss = Callable[[Any, Any], jax.Array]
"""(model, batch of n examples) -> float32 `(n,)`."""


def make_optimizer(
    method: str,
    learning_rate: optax.ScalarOrSchedule,
    *,
    second_moment: Literal["calibrated", "factored", "diagonal"] = "calibrated",
    pairs: loft_jax.LoraPairs | None = None,
    weight_decay: float = 0.0,
    max_norm: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW behind gradient clipping, for adapters with LoFT, for plain ones, or for all weights.

    LoFT clips the norm of the gradients that full fine-tuning would see, projected on what the
    adapters can express, so that `max_norm` means the same for `loft` and for `full`.

    Args:
        method: one of `METHODS`.
        learning_rate: a float, a traced scalar, or an Optax schedule.
        second_moment: LoFT's, "calibrated", "factored" or "diagonal".
        pairs: what LoFT should know of the adapters: their scale, and which axes stack layers.
        weight_decay: AdamW's decoupled decay.
        max_norm: the global norm at which gradients are clipped.
    """
    if method == "loft":
        return optax.chain(
            loft_jax.clip_by_projected_global_norm(max_norm, pairs=pairs),
            loft_jax.loft_adamw(
                learning_rate,
                weight_decay=weight_decay,
                second_moment=second_moment,
                pairs=pairs,
            ),
        )
    return optax.chain(
        optax.clip_by_global_norm(max_norm),
        optax.adamw(learning_rate, weight_decay=weight_decay),
    )


def trainable(method: str) -> Any:
    """The nnx filter of the parameters that a method trains."""
    return nnx.Param if method == "full" else nnx.LoRAParam


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
    ):
        """Splits the model; `optimizer` makes the transformation for a learning rate."""
        self._graphdef, trained, frozen = nnx.split(model, wrt, ...)
        self.frozen = nnx.as_pure(frozen)
        self._wrt = wrt
        self._mesh = meshes.mesh_of(trained)

        def losses(params: Any, frozen: Any, batch: Any) -> jax.Array:
            return loss(nnx.merge(self._graphdef, params, frozen), batch)

        def mean_loss(params: Any, frozen: Any, batch: Any) -> jax.Array:
            return losses(params, frozen, batch).mean()

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
        self._losses = jax.jit(losses, out_shardings=whole)
        self._whole = jax.jit(lambda tree: tree, out_shardings=whole)

    def start(self, model: nnx.Module) -> TrainState:
        """The state before the first step, from the model's present parameters."""
        return self._start(nnx.as_pure(nnx.state(model, self._wrt)))

    def step(
        self, state: TrainState, batch: Any, learning_rate: float
    ) -> tuple[TrainState, jax.Array]:
        """One update and the loss before it; `state`'s buffers are reused: do not keep it."""
        return self._step(state, self.frozen, self._put(batch), np.float32(learning_rate))

    def evaluate(self, params: Any, examples: np.ndarray, batch_size: int) -> np.ndarray:
        """The loss of each example, float32 `(n,)`, `batch_size` at a time."""
        values = []
        for begin in range(0, len(examples), batch_size):
            batch = examples[begin : begin + batch_size]
            # The last batch is filled up with copies, to keep to one compiled shape.
            padded = np.resize(batch, (batch_size, *batch.shape[1:]))
            losses = self._losses(params, self.frozen, self._put(padded))
            values.append(np.asarray(losses)[: len(batch)])
        return np.concatenate(values)

    def whole(self, params: Any) -> Any:
        """These parameters, whole on every device, and so readable by every process."""
        return self._whole(params)

    def _put(self, batch: Any) -> Any:
        if self._mesh is None:
            return batch
        return meshes.put(batch, meshes.batch_sharding(self._mesh, len(batch)))

    def model(self, params: Any) -> Any:
        """The module with these trained parameters."""
        return nnx.merge(self._graphdef, params, self.frozen)


def next_token_loss(model: Any, windows: jax.Array) -> jax.Array:
    """Mean nats a token of each window; int ids `(batch, length + 1)` to float32 `(batch,)`."""
    logits = model(windows[:, :-1]).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
    return losses.mean(axis=-1)
