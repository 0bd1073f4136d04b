"""Keras 3 on JAX with LoFT: `layer.enable_lora` adds the adapters, `loft_adamw` trains them.

The model runs as a function (`stateless_call`) under `jax.jit`, its adapters in a dictionary by
`variable.path`. What Keras calls ``kernel_a @ kernel_b`` over the last axis is one matrix to LoFT,
whatever the kernel's axes: each layer follows, step by step, a plain two-dimensional pair.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import hasty_compiler as hasty_compiler

from loft_jax import LoraPairs, loft_adamw
from loft_jax.pairs.find import find_pairs

os.environ.setdefault("KERAS_BACKEND", "jax")  # Keras reads it once, when it is imported
keras = pytest.importorskip("keras", reason="Keras is not installed: pip install keras")
if keras.backend.backend() != "jax":
    pytest.skip("Keras runs on another backend than JAX", allow_module_level=True)
from keras import layers  # noqa: E402  # its back end must be chosen first

RANK, ALPHA = 2, 5.0
STEPS = 20


def adapters_of(model: keras.Model) -> dict[str, jax.Array]:
    variables = [v for v in model.trainable_variables if v.name.startswith("lora_")]
    found = {v.path: v.value for v in variables}
    assert len(found) == len(variables)  # paths need not be unique where models are nested
    return found


def as_function(model: keras.Model) -> Callable[[dict[str, jax.Array], Any], jax.Array]:
    """The model as a function of its adapters and its input."""
    variables = model.trainable_variables
    constants = [v.value for v in model.non_trainable_variables]

    def call(adapters: dict[str, jax.Array], x: Any) -> jax.Array:
        values = [adapters.get(v.path, v.value) for v in variables]
        return model.stateless_call(values, constants, x)[0]

    return call


def train(
    loss: Callable[[Any], jax.Array], params: Any, pairs: LoraPairs | None = None
) -> tuple[list[Any], np.ndarray]:
    """The parameters and the loss before each step and after the last."""
    tx = loft_adamw(0.02, pairs=pairs)

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state, trajectory, losses = tx.init(params), [params], []
    for _ in range(STEPS):
        params, state, value = step(params, state)
        trajectory.append(params)
        losses.append(value)
    return trajectory, np.array([*losses, loss(params)])


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class Case(NamedTuple):
    """A layer, its input, the shapes of its factors, and the size of its weight as a matrix."""

    make: Callable[[], keras.Layer]
    x: np.ndarray
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    m: int
    n: int


# With these seeds no gradient is close to zero at the start, where Adam would amplify rounding
# errors by a factor of 1000.
TOKENS = np.random.default_rng(9).integers(0, 11, size=(8, 6))
CASES = {
    "dense": Case(lambda: layers.Dense(5), random(0, 16, 7), ((7, 2), (2, 5)), 7, 5),
    # Queries, keys and values of layers.MultiHeadAttention: (D, N, r) and (r, H).
    "einsum_to_heads": Case(
        lambda: layers.EinsumDense("abc,cde->abde", (None, 3, 4), bias_axes="de"),
        random(0, 4, 5, 6),
        ((6, 3, 2), (2, 4)),
        18,
        4,
    ),
    # Its output: (N, H, r) and (r, D).
    "einsum_from_heads": Case(
        lambda: layers.EinsumDense("abcd,cde->abe", (None, 6)),
        random(0, 4, 5, 3, 4),
        ((3, 4, 2), (2, 6)),
        12,
        6,
    ),
    "convolution": Case(
        lambda: layers.Conv2D(5, (3, 2)), random(3, 4, 6, 6, 3), ((3, 2, 3, 2), (2, 5)), 18, 5
    ),
    "grouped_convolution": Case(
        lambda: layers.Conv1D(6, 3, groups=2), random(3, 4, 8, 4), ((3, 2, 2), (2, 6)), 6, 6
    ),
    "embedding": Case(lambda: layers.Embedding(11, 4), TOKENS, ((11, 2), (2, 4)), 11, 4),
}


def adapted(case: Case, alpha: float | None) -> tuple[keras.Model, Callable]:
    """A model of the layer with its adapter, and a loss of its output."""
    keras.utils.set_random_seed(0)
    layer = case.make()
    model = keras.Sequential([layer])
    target = random(1, *model(case.x).shape)
    layer.enable_lora(RANK, lora_alpha=alpha)
    return model, lambda output: optax.l2_loss(output, target).mean()


@pytest.mark.parametrize("name", CASES)
def test_a_layer_trains_like_a_pair_of_matrices(name, assert_close):
    case, scale = CASES[name], ALPHA / RANK
    model, loss = adapted(case, ALPHA)
    run, adapters = as_function(model), adapters_of(model)
    path_a, path_b = adapters  # in the order in which Keras adds them
    assert (adapters[path_a].shape, adapters[path_b].shape) == case.shapes
    got, losses = train(lambda p: loss(run(p, case.x)), adapters, LoraPairs(scale=scale))

    # The layer without an adapter, with a kernel computed from two matrices.
    keras.utils.set_random_seed(0)
    plain = keras.Sequential([case.make()])
    plain(case.x)
    kernel, *others = (v.value for v in plain.trainable_variables)

    def plain_loss(p: dict[str, jax.Array]) -> jax.Array:
        merged = kernel + scale * (p["lora_a"] @ p["lora_b"]).reshape(kernel.shape)
        return loss(plain.stateless_call([merged, *others], [], case.x)[0])

    matrices = {
        "lora_a": adapters[path_a].reshape(case.m, RANK),
        "lora_b": adapters[path_b].reshape(RANK, case.n),
    }
    expected, expected_losses = train(plain_loss, matrices, LoraPairs(scale=scale))

    assert losses[-1] < 0.95 * losses[0]
    assert_close(losses, expected_losses, tolerance=1e-5, name="losses against two dimensions")
    for ours, theirs in zip(got, expected, strict=True):
        delta = scale * jnp.tensordot(ours[path_a], ours[path_b], axes=1)
        assert_close(
            delta.reshape(case.m, case.n),
            scale * theirs["lora_a"] @ theirs["lora_b"],
            tolerance=1e-5,
            name="weights against two dimensions",
        )


def test_training_does_not_depend_on_alpha_if_the_scale_is_specified(assert_close):
    # Without alpha Keras uses the rank, which is scale 1, the default of LoraPairs.
    case = CASES["dense"]

    def losses(alpha: float | None, pairs: LoraPairs | None) -> np.ndarray:
        model, loss = adapted(case, alpha)
        run = as_function(model)
        return train(lambda p: loss(run(p, case.x)), adapters_of(model), pairs)[1]

    plain = losses(None, None)
    assert_close(losses(ALPHA, LoraPairs(scale=ALPHA / RANK)), plain, tolerance=1e-4)
    assert np.abs(losses(ALPHA, None) - plain).max() > 1e-2


def test_a_model_of_all_these_layers_trains_and_loads_its_adapters(assert_close):
    keras.utils.set_random_seed(0)
    tokens = keras.Input((6,), dtype="int32")
    x = layers.Embedding(11, 8, name="embedding")(tokens)
    x = x + layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = layers.Conv1D(8, 3, activation="relu", name="convolution")(x)
    model = keras.Model(tokens, layers.Dense(3, name="head")(x))
    attention = model.get_layer("attention")
    for name in ("query_dense", "key_dense", "value_dense", "output_dense"):
        getattr(attention, name).enable_lora(RANK, lora_alpha=ALPHA)
    for name in ("embedding", "convolution", "head"):
        model.get_layer(name).enable_lora(RANK)
    adapters, run = adapters_of(model), as_function(model)
    before = [np.array(v.value) for v in model.variables if v.path not in adapters]

    target = random(1, *model(TOKENS).shape)
    loss = lambda p: optax.l2_loss(run(p, TOKENS), target).mean()
    pairs = LoraPairs(scale=(("attention/.*", ALPHA / RANK),))
    found = find_pairs(adapters, pairs).pairs
    assert len(found) == 4 + 3 and len(adapters) == 2 * len(found)
    assert sorted(pair.scale for pair in found) == [1.0] * 3 + [ALPHA / RANK] * 4
    trajectory, losses = train(loss, adapters, pairs)
    assert losses[-1] < 0.7 * losses[0]
    assert all(not np.array_equal(trajectory[-1][path], adapters[path]) for path in adapters)

    for v in model.trainable_variables:
        if v.path in adapters:
            v.assign(trajectory[-1][v.path])
    assert_close(optax.l2_loss(model(TOKENS), target).mean(), losses[-1], tolerance=1e-6)
    after = [np.array(v.value) for v in model.variables if v.path not in adapters]
    assert all(map(np.array_equal, before, after))


def test_layers_with_equal_paths_are_distinguished_by_position():
    # Keras gives both layers of a nested model the same path, so a dictionary by path would
    # contain only one of them.
    keras.utils.set_random_seed(0)

    def inner() -> keras.Model:
        x = keras.Input((4,))
        return keras.Model(x, layers.Dense(4, name="dense")(x))

    x, parts = keras.Input((4,)), [inner(), inner()]
    model = keras.Model(x, parts[1](parts[0](x)))
    denses = [part.get_layer("dense") for part in parts]
    for dense in denses:
        dense.enable_lora(RANK)
    adapters = [
        {v.name: v.value for v in dense.trainable_variables if v.name.startswith("lora_")}
        for dense in denses
    ]
    places = {
        id(v): (k, v.name) for k, dense in enumerate(denses) for v in dense.trainable_variables
    }
    constants = [v.value for v in model.non_trainable_variables]
    inputs, target = random(0, 16, 4), random(1, 16, 4)

    def loss(adapters: list[dict[str, jax.Array]]) -> jax.Array:
        where = [(v, *places[id(v)]) for v in model.trainable_variables]
        values = [adapters[k].get(name, v.value) for v, k, name in where]
        return optax.l2_loss(model.stateless_call(values, constants, inputs)[0], target).mean()

    trajectory, losses = train(loss, adapters)
    assert losses[-1] < 0.9 * losses[0]
    for before, after in zip(adapters, trajectory[-1], strict=True):
        assert all(not np.array_equal(before[name], after[name]) for name in before)
