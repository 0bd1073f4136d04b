"""The distance of LoFT to the exact trajectories that the paper proves it to follow.

Lemma 1: momentum in the right subspaces. Lemma 2: a step of size one is alternating least squares.
Full rank: AdamW, momentum and Muon on the weight. The references are dense and in float64; LoFT
runs in float64 and in float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from loft_jax import loft_adamw, loft_muon, loft_sgd

M, N, RANK, STEPS, WIDTH = 1024, 512, 8, 100, 48

Gradient = Callable[[np.ndarray, int], np.ndarray]


def exactness() -> list[tuple[str, np.ndarray]]:
    """A list of ``(label, relative distance after each step)``."""
    found = []
    for dtype in (np.float64, np.float32):
        name = np.dtype(dtype).name
        found += [
            (f"Lemma 1, {name}", _lemma_1(dtype)),
            (f"Lemma 2, {name}", _lemma_2(dtype)),
            *((f"full rank, {label}, {name}", x) for label, x in _full_rank(dtype)),
        ]
    return found


def _lemma_1(dtype: Any) -> np.ndarray:
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(M, RANK)), rng.normal(size=(N, RANK))
    target = left @ right.T
    u = left @ rng.normal(size=(RANK, RANK)) / RANK
    v = right @ rng.normal(size=(RANK, RANK)) / RANK
    gradient: Gradient = lambda w, k: w - target
    w, moment, path = u @ v.T, 0.0, []
    for k in range(STEPS):
        moment = 0.9 * moment + gradient(w, k)
        w = w - 0.02 * moment
        path.append(w)
    return _distances(loft_sgd(0.02, momentum=0.9), u, v, gradient, path, dtype)


def _lemma_2(dtype: Any) -> np.ndarray:
    rng = np.random.default_rng(0)
    # Without noise two steps would reach the target.
    target = rng.normal(size=(M, RANK)) @ rng.normal(size=(RANK, N)) + rng.normal(size=(M, N))
    u, v = rng.uniform(-1, 1, (M, RANK)) / M**0.5, np.zeros((N, RANK))
    start, path = (u, v), []
    for k in range(STEPS):
        if k % 2 == 0:
            v = np.linalg.lstsq(u, target, rcond=None)[0].T
        else:
            u = np.linalg.lstsq(v, target.T, rcond=None)[0].T
        path.append(u @ v.T)
    return _distances(loft_sgd(1.0), *start, lambda w, k: w - target, path, dtype)


def _full_rank(dtype: Any) -> list[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    base, *factors = rng.normal(size=(3, WIDTH, WIDTH)) / WIDTH**0.5
    u, v = (np.linalg.qr(x)[0] for x in factors)
    inputs, outputs = rng.normal(size=(2, STEPS, 16, WIDTH))
    # Each step has its own batch, and the objective is not quadratic.
    gradient: Gradient = lambda w, k: inputs[k].T @ np.tanh(inputs[k] @ (base + w) - outputs[k])
    rows = (
        ("LoFT-AdamW", loft_adamw(0.01, weight_decay=0.0), optax.adamw(0.01, weight_decay=0.0)),
        ("LoFT-SGD with momentum", loft_sgd(3e-4, momentum=0.9), optax.sgd(3e-4, 0.9)),
        # No epsilon: Optax adds it to the norm of an average, Algorithm 2 to that of a sum.
        (
            "LoFT-Muon",
            loft_muon(0.02, eps=0.0),
            optax.contrib.muon(0.02, eps=0.0, nesterov=False),
        ),
    )
    found = []
    for label, loft, full in rows:
        with jax.enable_x64(True):
            w, path = jnp.asarray(u @ v.T), []
            state = full.init(w)
            for k in range(STEPS):
                g = jnp.asarray(gradient(np.asarray(w), k))
                updates, state = full.update(g, state, w)
                w = jnp.asarray(optax.apply_updates(w, updates))
                path.append(np.asarray(w))
        found.append((label, _distances(loft, u, v, gradient, path, dtype)))
    return found


def _distances(
    tx: optax.GradientTransformation,
    u: np.ndarray,
    v: np.ndarray,
    gradient: Gradient,
    path: list[np.ndarray],
    dtype: Any,
) -> np.ndarray:
    """Trains the factors; returns ``|U V^T - W| / |W|`` in Frobenius norms after each step."""
    with jax.enable_x64(dtype == np.float64):
        params: Any = {"lora_a": jnp.asarray(u, dtype), "lora_b": jnp.asarray(v.T, dtype)}
        state, update, found = tx.init(params), jax.jit(tx.update), []
        for k, expected in enumerate(path):
            u, v = _factors(params)
            g = gradient(u @ v, k)
            grads = {"lora_a": jnp.asarray(g @ v.T, dtype), "lora_b": jnp.asarray(u.T @ g, dtype)}
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
            u, v = _factors(params)
            found.append(np.linalg.norm(u @ v - expected) / np.linalg.norm(expected))
    return np.asarray(found)


def _factors(params: Any) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(params["lora_a"], np.float64), np.asarray(params["lora_b"], np.float64)
