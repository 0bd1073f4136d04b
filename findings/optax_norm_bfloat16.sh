#!/usr/bin/env bash
# optax 0.2.8 and jax 0.10.2: global_norm of bfloat16 gradients adds the squared norms of the leaves in bfloat16,
# one after the other, although jax adds inside a leaf in float32. At 256 the sum stands still if each leaf adds 1.
# LoRA of 32 layers with 7 matrices has 448 leaves; if each has norm 1, their norm is 21.2, and optax says 16. So
# clip_by_global_norm(1) leaves a norm of 1.32. If one leaf has norm 16, the order of the names decides whether the
# others count at all. All of this is the same under jit.
#
# Seen: "448 leaves: optax 16.00, true 21.17, clipped to 1.32", "the largest first 16.00, last 22.62, true 26.51".
# Fails if that changes. CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check optax==0.2.8 jax==0.10.2
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
import numpy as np
import optax


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in tree.values()))


def tree(norms):
    return {f"{n:03}": jnp.full(64, size / 8, jnp.bfloat16) for n, size in enumerate(norms)}


def check(gradients):
    eager, compiled = optax.global_norm(gradients), jax.jit(optax.global_norm)(gradients)
    assert eager == compiled
    return float(eager)


leaves = tree([1.0] * 448)
clip = optax.clip_by_global_norm(1.0)
clipped, _ = clip.update(leaves, clip.init(leaves))
found, true, left = check(leaves), norm(leaves), norm(clipped)
print(f"448 leaves: optax {found:.2f}, true {true:.2f}, clipped to {left:.2f}")
first, last = tree([16.0] + [1.0] * 447), tree([1.0] * 447 + [16.0])
orders = check(first), check(last)
print(f"the largest first {orders[0]:.2f}, last {orders[1]:.2f}, true {norm(first):.2f}")
assert found == 16 and true > 21 and left > 1.3
assert orders[0] == 16 and orders[1] > 22
PY
