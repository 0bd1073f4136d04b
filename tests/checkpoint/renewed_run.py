"""A tiny training run with renewals: `renewed_run.py FOLDER STEPS`.

It saves every 30 steps and renews its adapter every 50, tells "saved STEP", and at the end hashes
of every bit of this run and of an uninterrupted one.
"""

import hashlib
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from loft_jax import loft_adamw
from loft_jax.adapters import renew
from loft_jax.checkpoint import Checkpoints

TX = loft_adamw(0.02, second_moment="factored")
Carry = tuple[Any, Any, Any, jax.Array]


def start() -> Carry:
    """The base, the adapter, the state of its optimizer and a random key."""
    draw = np.random.default_rng(0).normal
    base = {"q": {"kernel": jnp.asarray(draw(size=(9, 7)), jnp.float32)}}
    a = jnp.asarray(draw(size=(9, 2)), jnp.float32)
    adapter = {"q": {"lora_a": a, "lora_b": jnp.zeros((2, 7))}}
    return base, adapter, TX.init(adapter), jax.random.key(0)


@jax.jit
def ten_steps(carry: Carry) -> Carry:
    def step(carry: Carry, _: None) -> tuple[Carry, None]:
        base, adapter, state, key = carry
        key, of_batch = jax.random.split(key)
        x = jax.random.normal(of_batch, (4, 9))

        def loss(adapter: Any) -> jax.Array:
            y = x @ base["q"]["kernel"] + x @ adapter["q"]["lora_a"] @ adapter["q"]["lora_b"]
            return jnp.mean((jnp.tanh(y) - x[:, :7]) ** 2)

        updates, state = TX.update(jax.grad(loss)(adapter), state, adapter)
        return (base, optax.apply_updates(adapter, updates), state, key), None

    return jax.lax.scan(step, carry, length=10)[0]


@jax.jit
def renewed(carry: Carry) -> Carry:
    base, adapter, state, key = carry
    key, of_renewal = jax.random.split(key)
    return *renew(base, adapter, state, of_renewal), key


def train(carry: Carry, step: int, steps: int, checkpoints: Checkpoints | None = None) -> Carry:
    while step < steps:
        carry = ten_steps(carry)
        step += 10
        if step % 50 == 0:
            carry = renewed(carry)
        if checkpoints is not None and step % 30 == 0:
            base, adapter, state, key = carry
            # The base has changed since it was loaded: it belongs to what is saved.
            both = {"base": base, "adapter": adapter}
            checkpoints.save(step, adapter=both, opt_state=state, key=key)
            checkpoints.wait()
            print(f"saved {step}", flush=True)
    return carry


def fingerprint(carry: Carry) -> str:
    *trees, key = carry
    leaves = jax.tree_util.tree_leaves_with_path((trees, jax.random.key_data(key)))
    found = hashlib.sha256()
    for path, leaf in leaves:
        found.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def main(folder: str, steps: int) -> None:
    carry, step = start(), 0
    with Checkpoints(Path(folder)) as checkpoints:
        base, adapter, state, key = carry
        both = {"base": base, "adapter": adapter}
        found = checkpoints.restore(adapter=both, opt_state=state, key=key)
        if found is not None:
            step = found.step
            carry = found.adapter["base"], found.adapter["adapter"], found.opt_state, found.key
        print(f"resumed {step}", flush=True)
        carry = train(carry, step, steps, checkpoints)
    print(f"this run {fingerprint(carry)}")
    print(f"uninterrupted run {fingerprint(train(start(), 0, steps))}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
