"""Any sequence of gradients, overflows, checkpoints and meshes, against the dense float64 oracle.

LOFT_JAX_EXAMPLES=2000 pytest -n 0 tests/test_optimizer_model.py
"""

import collections
import functools
import os
import tempfile

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
from optimizers import hasty_compiler as hasty_compiler
from oracles import DenseMoments, Hyper, Problem, clip_factor, projector
from trajectories import transformation

from loft_jax.checkpoint import Checkpoints

EXAMPLES = int(os.environ.get("LOFT_JAX_EXAMPLES", "12"))
STEPS = collections.Counter()
PROBLEM = Problem(8, 4, 2, seed=3, scale=2.0)


class Oracle:
    """The dense method, one step at a time."""

    def __init__(self, hyper: Hyper):
        self.hyper, self.u, self.v = hyper, PROBLEM.u, PROBLEM.v
        self.moments = DenseMoments(hyper), DenseMoments(hyper)
        self.steps = 0

    def see(self, gradient: np.ndarray) -> None:
        h, u, v, move_u = self.hyper, self.u, self.v, self.steps % 2 == 1
        g = gradient * clip_factor([gradient], [u], [v], h, move_u)
        of_u, of_v = self.moments
        of_u.see(g, projector(v))
        of_v.see(g.T, projector(u))
        decay = 1 - h.lr * h.weight_decay
        if move_u:
            self.u = decay * u - h.lr * of_u.direction() @ np.linalg.pinv(v).T / PROBLEM.scale
        else:
            self.v = decay * v - h.lr * of_v.direction() @ np.linalg.pinv(u).T / PROBLEM.scale
        self.steps += 1


@functools.cache
def optimizer(factored: bool):
    """Refusal, clipping and LoFT-AdamW, with one program a mesh.

    `optax.MultiSteps` adds up in float32, so that accumulation has a test of its own.
    """
    hyper = Hyper(lr=0.02, weight_decay=0.1, max_norm=3.0, factored=factored)
    tx = optax.apply_if_finite(transformation([PROBLEM], hyper), max_consecutive_errors=1000)
    return hyper, tx, jax.jit(tx.update)


class Training(RuleBasedStateMachine):
    @initialize(factored=st.booleans())
    def start(self, factored):
        self.factored = factored
        hyper, tx, self.update = optimizer(factored)
        self.oracle = Oracle(hyper)
        factors = {"lora_a": PROBLEM.u, "lora_b": PROBLEM.v.T}
        self.params = {"layer0": jax.tree.map(jnp.asarray, factors)}
        self.state = tx.init(self.params)
        self.batch = 0

    def gradients(self, g: np.ndarray):
        # Of the factors that the optimizer holds: balanced ones differ from the oracle's.
        u, v = self.factors()
        return {"layer0": {"lora_a": PROBLEM.scale * g @ v, "lora_b": PROBLEM.scale * u.T @ g}}

    def factors(self):
        layer = self.params["layer0"]
        return np.asarray(layer["lora_a"]), np.asarray(layer["lora_b"]).T

    def step(self, gradients):
        gradients = jax.tree.map(
            lambda g, p: jax.device_put(g, p.sharding) if p.committed else jnp.asarray(g),
            gradients,
            self.params,
        )
        updates, self.state = self.update(gradients, self.state, self.params)
        self.params = optax.apply_updates(self.params, updates)

    @rule(times=st.integers(1, 3))
    def trains(self, times):
        for _ in range(times):
            STEPS["gradient"] += 1
            g = PROBLEM.gradient(PROBLEM.weight(self.oracle.u, self.oracle.v), self.batch)
            self.step(self.gradients(g))
            self.oracle.see(g)
            self.batch += 1

    @rule(bad=st.sampled_from([np.nan, np.inf, -np.inf]), factor=st.sampled_from("ab"))
    def overflows(self, bad, factor):
        STEPS["not finite"] += 1
        gradients = self.gradients(np.ones((8, 4)))
        gradients["layer0"][f"lora_{factor}"][0, 1] = bad
        self.step(gradients)

    @rule()
    def is_saved_and_resumed(self):
        STEPS["checkpoint"] += 1
        trees = {"adapter": self.params, "opt_state": self.state}
        with tempfile.TemporaryDirectory() as folder:
            with Checkpoints(folder) as checkpoints:
                checkpoints.save(self.batch, **trees)
            abstract = jax.tree.map(jnp.zeros_like, trees)
            with Checkpoints(folder) as checkpoints:
                found = checkpoints.restore(**abstract)
        self.params, self.state = found.adapter, found.opt_state

    @rule(devices=st.sampled_from([1, 4]))
    def moves_to_another_mesh(self, devices):
        STEPS["mesh"] += 1
        mesh = jax.make_mesh((devices,), ("x",), devices=jax.devices()[:devices])

        def place(x):
            rows = [axis for axis, size in enumerate(x.shape) if size % 4 == 0]
            spec = P(*("x" if axis == rows[0] else None for axis in range(x.ndim))) if rows else P()
            return jax.device_put(x, NamedSharding(mesh, spec))

        self.params, self.state = jax.tree.map(place, (self.params, self.state))

    @invariant()
    def is_where_the_oracle_is(self):
        if hasattr(self, "oracle"):
            got = PROBLEM.weight(*self.factors())
            expected = PROBLEM.weight(self.oracle.u, self.oracle.v)
            assert np.abs(got - expected).max() < 1e-10
            assert int(optax.tree.get_all_with_path(self.state, "active")[0][1]) == (
                self.oracle.steps % 2
            )


@pytest.mark.usefixtures("x64")
def test_any_sequence_is_what_the_oracle_says(report):
    run_state_machine_as_test(
        Training,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=15,
            deadline=None,
            derandomize=EXAMPLES < 100,
            suppress_health_check=list(HealthCheck),
        ),
    )
    report(f"the optimizer against the oracle: {EXAMPLES} examples, {dict(sorted(STEPS.items()))}")
