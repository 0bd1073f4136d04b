#!/usr/bin/env bash
# optax 0.2.8: with float64 parameters and gradients, MultiSteps accumulates in float32. The mean is then
# wrong by 1e-8, and a test in float64 against an oracle cannot go below that.
#
# Seen: "float32, off by 1.5e-08". Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check optax==0.2.8 jax==0.10.2
JAX_ENABLE_X64=1 JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import jax.numpy as jnp
import numpy as np
import optax

tx = optax.MultiSteps(optax.identity(), 2).gradient_transformation()
params = {"w": jnp.zeros(100)}
assert params["w"].dtype == jnp.float64
state = tx.init(params)
first, second = np.random.default_rng(0).random((2, 100))
for gradient in (first, second):
    updates, state = tx.update({"w": jnp.asarray(gradient)}, state, params)
error = np.abs(np.asarray(updates["w"]) - (first + second) / 2).max()
print(f"{state.acc_grads['w'].dtype}, off by {error:.1e}")
assert state.acc_grads["w"].dtype == jnp.float32 and 1e-10 < error < 1e-7
PY
