"""A compiled training step and evaluation.

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

Loss = Callable[[Any, Any], jax.Array | tuple[jax.Array, jax.Array]]
"""(model, batch of n examples) -> the loss of each, float32 `(n,)`, whose mean is minimised.

A pair of arrays `(n,)` is a loss and a weight of each example, such as the sum over its trained
tokens and their number: the sum of the losses, divided by the sum of the weights, is minimised.
"""

Outputs = Callable[[Any, Any], Any]
"""(model, batch of n examples) -> an array or a tree of arrays, each `(n, ...)`."""


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

    Dropout is on in the steps and off in evaluation. Its masks depend only on the keys in the
    model and on the step, so a resumed run draws the same ones.
    """

    def __init__(
        self,
        model: nnx.Module,
        loss: Loss,
        optimizer: Callable[[Any], optax.GradientTransformation],
        wrt: Any = nnx.LoRAParam,
        outputs: Outputs | None = None,
        accumulate: int = 1,
    ):
        """Splits the model.

        Args:
            model: with all its parameters, frozen ones included. Its dropout is switched off.
            loss: its mean over a batch is minimised.
            optimizer: makes the transformation for a learning rate.
            wrt: the nnx filter of the trained parameters.
            outputs: what `evaluate` computes for each example; None for the loss.
            accumulate: the number of equal parts of a batch that are computed one after another,
                to save memory. The result is that of the whole batch.
        """
        self._accumulate = accumulate
        model.train()
        training = nnx.graphdef(model)
        model.eval()
        self._graphdef, trained, keys, counts, frozen = nnx.split(
            model, wrt, nnx.RngKey, nnx.RngCount, ...
        )
        self.frozen = nnx.as_pure(frozen)
        # On the host, where every process and device can use them.
        data_of = lambda key: np.asarray(jax.random.key_data(key))
        self._keys = jax.tree.map(data_of, nnx.as_pure(keys))
        self._counts = jax.tree.map(np.asarray, nnx.as_pure(counts))
        self._wrt = wrt
        self._mesh = meshes.mesh_of((trained, frozen))  # `trained` alone may be empty

        def evaluate(params: Any, frozen: Any, batch: Any) -> Any:
            return (outputs or loss)(self._merge(self._graphdef, params, frozen), batch)

        def total(
            params: Any, frozen: Any, part: Any, count: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            found = loss(self._merge(training, params, frozen, count), part)
            losses, weights = found if isinstance(found, tuple) else (found, jnp.ones_like(found))
            return losses.sum(), weights.sum()

        def step(state: TrainState, frozen: Any, parts: Any, learning_rate: jax.Array):
            def add(sums: Any, numbered: Any) -> tuple[Any, None]:
                number, part = numbered
                (value, weight), gradients = jax.value_and_grad(total, has_aux=True)(
                    state.params, frozen, part, state.step * accumulate + number
                )
                return jax.tree.map(jnp.add, sums, (value, weight, gradients)), None

            zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros([]), jnp.zeros([]), state.params))
            (value, weight, gradients), _ = jax.lax.scan(
                add, zeros, (jnp.arange(accumulate), parts)
            )
            # A batch without a trained token has weight 0, loss 0 and gradient 0.
            value, gradients = jax.tree.map(
                lambda x: x / jnp.maximum(weight, 1), (value, gradients)
            )
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
        options = _compiler_options(self.frozen)
        self._step = jax.jit(
            step, donate_argnums=0, out_shardings=(of_state, whole), compiler_options=options
        )
        self._evaluate = jax.jit(evaluate, out_shardings=whole, compiler_options=options)
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
        split = lambda array: array.reshape(self._accumulate, -1, *array.shape[1:])
        parts = self._put(jax.tree.map(split, batch), axis=1)
        return self._step(state, self.frozen, parts, np.float32(learning_rate))

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
        return self._merge(self._graphdef, params, self.frozen)

    def _merge(self, graphdef: Any, params: Any, frozen: Any, count: Any = 0) -> Any:
        """The module whose dropout has drawn `count` masks."""
        keys = jax.tree.map(jax.random.wrap_key_data, self._keys)
        counts = jax.tree.map(lambda x: jnp.full_like(x, count), self._counts)
        return nnx.merge(graphdef, params, keys, counts, frozen)

    def _put(self, batch: Any, axis: int = 0) -> Any:
        """Shards the examples, which are along `axis`, over the mesh, if there is one."""
        if self._mesh is None:
            return batch
        rows = jax.tree.leaves(batch)[0].shape[axis]
        sharding = meshes.batch_sharding(self._mesh, rows, axis)
        return jax.tree.map(lambda array: meshes.put(array, sharding), batch)


def _compiler_options(frozen: Any) -> dict[str, str | bool] | None:
    """Options that save memory on a CPU with 16-bit weights.

    XLA slices the weights of a layer out of a float32 copy of those of all layers there, and of
    kept activations too. It must not make these copies before the loop over the layers, where they
    would stay for the whole step: inside, a slice needs no copy.
    """
    half = any(leaf.dtype in (jnp.bfloat16, jnp.float16) for leaf in jax.tree.leaves(frozen))
    if not half or jax.default_backend() != "cpu":
        return None
    return {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
