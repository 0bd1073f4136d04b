"""Any sequence of gradients, overflows, checkpoints and meshes, against the dense float64 oracle.

LOFT_JAX_EXAMPLES=100000 pytest -n 0 tests/test_optimizer_model.py
"""

import collections
import functools
import os
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from numpy_storage import IN_MEMORY
from numpy_storage import numpy_storage as numpy_storage
from optimizers import hasty_compiler as hasty_compiler
from oracles import DenseMoments, Hyper, Problem, clip_factor, projector
from trajectories import transformation

from loft_jax.checkpoint import Checkpoints

EXAMPLES = int(os.environ.get("LOFT_JAX_EXAMPLES", "0"))
STEPS = collections.Counter()
PROBLEM = Problem(8, 4, 2, seed=3, scale=2.0)
MESHES = (1, 4)
"""Numbers of devices."""


@functools.cache
def hyper(factored: bool) -> Hyper:
    return Hyper(lr=0.02, weight_decay=0.1, max_norm=3.0, factored=factored)


class Oracle:
    """The dense method. Its gradients follow from its weights, so that it has one path."""

    def __init__(self, factored: bool):
        self.hyper, self.u, self.v = hyper(factored), PROBLEM.u, PROBLEM.v
        self.moments = DenseMoments(self.hyper), DenseMoments(self.hyper)
        self.weights, self.gradients = [PROBLEM.weight(self.u, self.v)], []

    def extend(self) -> None:
        h, u, v, step = self.hyper, self.u, self.v, len(self.gradients)
        move_u, raw = step % 2 == 1, PROBLEM.gradient(self.weights[-1], step)
        g = raw * clip_factor([raw], [u], [v], h, move_u)
        of_u, of_v = self.moments
        of_u.see(g, projector(v))
        of_v.see(g.T, projector(u))
        decay = 1 - h.lr * h.weight_decay
        if move_u:
            self.u = decay * u - h.lr * of_u.direction() @ np.linalg.pinv(v).T / PROBLEM.scale
        else:
            self.v = decay * v - h.lr * of_v.direction() @ np.linalg.pinv(u).T / PROBLEM.scale
        self.gradients.append(raw)
        self.weights.append(PROBLEM.weight(self.u, self.v))


@functools.cache
def oracle(factored: bool, steps: int = 40) -> Oracle:
    found = Oracle(factored)
    for _ in range(steps):
        found.extend()
    return found


@functools.cache
def optimizer(factored: bool) -> tuple[optax.GradientTransformation, Any]:
    """Refusal, clipping and LoFT-AdamW, and its first parameters and state.

    `optax.MultiSteps` adds up in float32, so that accumulation has a test of its own.
    """
    tx = optax.apply_if_finite(
        transformation([PROBLEM], hyper(factored)), max_consecutive_errors=1000
    )
    params = {"layer0": {"lora_a": jnp.asarray(PROBLEM.u), "lora_b": jnp.asarray(PROBLEM.v.T)}}
    return tx, (params, jax.jit(tx.init)(params))


@functools.cache
def shardings(factored: bool, devices: int) -> Any:
    mesh = jax.make_mesh((devices,), ("x",), devices=jax.devices()[:devices])

    def sharding(x):
        rows = [axis for axis, size in enumerate(x.shape) if size % 4 == 0]
        spec = P(*("x" if axis == rows[0] else None for axis in range(x.ndim))) if rows else P()
        return NamedSharding(mesh, spec)

    return jax.tree.map(sharding, optimizer(factored)[1])


@functools.cache
def program(factored: bool, devices: int) -> Callable[..., Any]:
    """One program for each second moment and mesh."""
    tx, _ = optimizer(factored)

    def train(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(train, out_shardings=shardings(factored, devices))


@functools.cache
def targets(factored: bool, devices: int) -> Any:
    """What checkpoints are restored to: arrays of zeros."""
    zeros = jax.tree.map(jnp.zeros_like, optimizer(factored)[1])
    return jax.device_put(zeros, shardings(factored, devices))


class Training(RuleBasedStateMachine):
    @initialize(factored=st.booleans())
    def start(self, factored):
        self.factored, self.oracle, self.steps = factored, oracle(factored), 0
        _, (self.params, self.state) = optimizer(factored)
        self.place(MESHES[0])

    def place(self, devices):
        self.devices, trees = devices, (self.params, self.state)
        self.params, self.state = jax.device_put(trees, shardings(self.factored, devices))

    def gradients(self, g: np.ndarray):
        # Of the factors that the optimizer holds: balanced ones differ from the oracle's.
        u, v = self.factors()
        return {"layer0": {"lora_a": PROBLEM.scale * g @ v, "lora_b": PROBLEM.scale * u.T @ g}}

    def factors(self):
        layer = self.params["layer0"]
        return np.asarray(layer["lora_a"]), np.asarray(layer["lora_b"]).T

    def step(self, gradients):
        train = program(self.factored, self.devices)
        self.params, self.state = train(self.params, self.state, gradients)

    @rule(times=st.integers(1, 3))
    def trains(self, times):
        for _ in range(times):
            STEPS["gradient"] += 1
            self.step(self.gradients(self.oracle.gradients[self.steps]))
            self.steps += 1

    @rule(bad=st.sampled_from([np.nan, np.inf, -np.inf]), factor=st.sampled_from("ab"))
    def overflows(self, bad, factor):
        STEPS["not finite"] += 1
        gradients = self.gradients(np.ones((8, 4)))
        gradients["layer0"][f"lora_{factor}"][0, 1] = bad
        self.step(gradients)

    @rule()
    def is_saved_and_resumed(self):
        STEPS["checkpoint"] += 1
        params, state = targets(self.factored, self.devices)
        with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
            with Checkpoints(folder) as checkpoints:
                checkpoints.save(self.steps, adapter=self.params, opt_state=self.state)
            with Checkpoints(folder, read_only=True) as checkpoints:
                found = checkpoints.restore(adapter=params, opt_state=state)
        self.params, self.state = found.adapter, found.opt_state

    @rule(devices=st.sampled_from(MESHES))
    def moves_to_another_mesh(self, devices):
        STEPS["mesh"] += 1
        self.place(devices)

    @invariant()
    def is_where_the_oracle_is(self):
        if hasattr(self, "oracle"):
            got = PROBLEM.weight(*self.factors())
            assert np.abs(got - self.oracle.weights[self.steps]).max() < 1e-10
            active = optax.tree.get_all_with_path(self.state, "active")[0][1]
            assert int(active) == self.steps % 2


@pytest.mark.usefixtures("x64", "numpy_storage")
def test_any_sequence_is_what_the_oracle_says(report):
    examples = EXAMPLES or 500
    STEPS.clear()
    run_state_machine_as_test(
        Training,
        settings=settings(
            max_examples=examples,
            stateful_step_count=10,
            deadline=None,
            database=None,
            derandomize=not EXAMPLES,
            suppress_health_check=list(HealthCheck),
        ),
    )
    counts = dict(sorted(STEPS.items()))
    report(f"the optimizer against the oracle: {examples} examples, {counts}")
