"""The one table of this package's optimizers, and small trees to run them on.

A new optimizer is one line of `LOFT` or `BASELINES`: every contract then holds for it, or a test
says so.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loft_jax import (
    LoraPairs,
    baselines,
    clip_by_projected_global_norm,
    loft_adamw,
    loft_muon,
    loft_sgd,
    scale_by_loft_adam,
    scale_by_loft_momentum,
    scale_by_loft_muon,
)


def clipped_loft_adamw(
    learning_rate: float, max_norm: float = 1.0, pairs: LoraPairs | None = None
) -> optax.GradientTransformation:
    """Block 6 before the rest, as a user chains them."""
    return optax.chain(
        clip_by_projected_global_norm(max_norm, pairs=pairs),
        loft_adamw(learning_rate, weight_decay=0.1, pairs=pairs),
    )


_loft_adamw = functools.partial(loft_adamw, learning_rate=0.1, weight_decay=0.1)

LOFT: dict[str, functools.partial] = {
    "loft_adamw": _loft_adamw,
    "loft_adamw_factored": functools.partial(_loft_adamw, second_moment="factored"),
    "loft_adamw_diagonal": functools.partial(_loft_adamw, second_moment="diagonal"),
    "loft_adamw_uncalibrated": functools.partial(_loft_adamw, calibrate=False),
    "loft_adamw_simultaneous": functools.partial(_loft_adamw, alternate=False),
    "loft_adamw_entrywise": functools.partial(_loft_adamw, scale_gradient=False, reconstruct=False),
    "loft_adamw_a_first": functools.partial(_loft_adamw, moves_first="a"),
    "scale_by_loft_adam": functools.partial(scale_by_loft_adam),
    "scale_by_loft_adam_factored": functools.partial(scale_by_loft_adam, second_moment="factored"),
    "loft_sgd": functools.partial(loft_sgd, learning_rate=0.1),
    "loft_sgd_momentum": functools.partial(loft_sgd, learning_rate=0.1, momentum=0.9),
    "scale_by_loft_momentum": functools.partial(scale_by_loft_momentum, nesterov=True),
    "loft_muon": functools.partial(loft_muon, learning_rate=0.1, weight_decay=0.1),
    "scale_by_loft_muon": functools.partial(scale_by_loft_muon, consistent_rms=0.2),
    "clip": functools.partial(clip_by_projected_global_norm, max_norm=1.0),
    "clip_simultaneous": functools.partial(
        clip_by_projected_global_norm, max_norm=1.0, alternate=False
    ),
    "clipped_loft_adamw": functools.partial(clipped_loft_adamw, learning_rate=0.1),
}
BASELINES: dict[str, functools.partial] = {
    "lora_plus": functools.partial(baselines.lora_plus, learning_rate=0.1, weight_decay=0.1),
    "scaled_adamw": functools.partial(baselines.scaled_adamw, learning_rate=0.1),
    "scaled_sgd": functools.partial(baselines.scaled_sgd, learning_rate=0.1),
    "lora_fa": functools.partial(baselines.lora_fa, learning_rate=0.1, weight_decay=0.1),
    "altlora": functools.partial(baselines.altlora, learning_rate=0.1, weight_decay=0.1),
    "altlora_plus": functools.partial(baselines.altlora_plus, learning_rate=0.1),
    "lora_pro": functools.partial(baselines.lora_pro, learning_rate=0.1),
    "lora_rite": functools.partial(baselines.lora_rite, learning_rate=0.1, weight_decay=0.1),
}
OPTIMIZERS = LOFT | BASELINES


def random_like(tree: Any, seed: int) -> Any:
    """Normal entries in the shapes and dtypes of a tree, drawn leaf after leaf."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


def small_params() -> Any:
    """Two equal layers, which the optimizers stack, and a non-LoRA head."""
    layer = {"lora_a": jnp.zeros((6, 2)), "lora_b": jnp.zeros((2, 5))}
    return random_like({"head": jnp.zeros((5, 3)), "layer0": layer, "layer1": layer}, 0)


def small_gradients(params: Any, steps: int = 4) -> list[Any]:
    return [random_like(params, seed) for seed in range(1, steps + 1)]


def compiled(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer whose update is compiled as a whole, even under `jax.disable_jit`."""
    jitted = jax.jit(tx.update)

    def update(*args):
        with jax.disable_jit(False):
            return jitted(*args)

    return optax.GradientTransformation(tx.init, update)


@functools.cache
def quick(make: functools.partial, **options: Any) -> optax.GradientTransformation:
    """An optimizer of the table with its update compiled once for all tests.

    Wrappers can run operation by operation around it: to compile every wrapper of every optimizer
    would take minutes.
    """
    return compiled(make(**options))


def train(
    tx: optax.GradientTransformation,
    params: Any,
    gradients: Sequence[Any],
    state: Any = None,
    **extra: Any,
) -> tuple[Any, Any]:
    """Applies gradients one after another; returns the last parameters and state.

    The step is first traced as `jax.jit` would, to see that no type changes from step to step. Its
    numbers are then computed operation by operation, but for what is compiled already.
    """
    state = tx.init(params) if state is None else state

    def step(gradient, state, params):
        updates, state = tx.update(gradient, state, params, **extra)
        return optax.apply_updates(params, updates), state

    assert types(jax.eval_shape(step, gradients[0], state, params)) == types((params, state))
    with jax.disable_jit():
        for gradient in gradients:
            params, state = step(gradient, state, params)
    return params, state


def types(tree: Any) -> Any:
    """Shape, dtype and weakness of each leaf."""
    return jax.tree.map(lambda x: f"{x.dtype}{x.shape}{'w' * x.weak_type}", tree)


def assert_trees_close(actual: Any, expected: Any, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Leaves equal up to the rounding of float32 and what the moments' ratio makes of it."""
    for path, x, y in _in_pairs(actual, expected):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol, atol, err_msg=path)


def assert_trees_identical(actual: Any, expected: Any) -> None:
    """Leaves equal to the bit, and in dtype."""
    for path, x, y in _in_pairs(actual, expected):
        assert x.dtype == y.dtype, path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def _in_pairs(actual: Any, expected: Any) -> list[tuple[str, Any, Any]]:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    with_paths = jax.tree_util.tree_leaves_with_path(actual)
    others = jax.tree.leaves(expected)
    return [(jax.tree_util.keystr(p), x, y) for (p, x), y in zip(with_paths, others, strict=True)]


every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())

# One optimizer for each kind of state, for tests that compile much and depend on little else.
_leaf_types = lambda make: frozenset(jax.tree.leaves(types(make().init(small_params()))))
_kinds = {_leaf_types(make): name for name, make in OPTIMIZERS.items()}.values()
every_kind = pytest.mark.parametrize("make", [OPTIMIZERS[name] for name in _kinds], ids=_kinds)
_ours = {_leaf_types(make): name for name, make in LOFT.items()}.values()
every_loft_kind = pytest.mark.parametrize("make", [LOFT[name] for name in _ours], ids=_ours)


@pytest.fixture(autouse=True, scope="module")
def hasty_compiler():
    """For a module that imports it: compiles programs that run once with little optimization."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
