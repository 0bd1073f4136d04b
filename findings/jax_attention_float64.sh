#!/usr/bin/env bash
# jax 0.10.2 and Flax 0.12.8: jax.nn.dot_product_attention computes the softmax of float64 inputs in float32.
# The result says float64 and is wrong by 1e-7. flax.nnx's function of that name calls it and is as wrong;
# flax.linen's has a softmax of its own and is right to 1e-15. So the same model in nnx cannot be compared with
# a float64 oracle, or checked by finite differences.
#
# Seen: "jax.nn 9.9e-08; flax.nnx 9.9e-08; flax.linen 6.7e-16". Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 flax==0.12.8
JAX_ENABLE_X64=1 JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

query, key, value = np.random.default_rng(0).standard_normal((3, 1, 16, 2, 8))
scores = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(8)
weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
expected = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(axis=-1, keepdims=True), value)
errors = {}
for module in (jax.nn, nnx, linen):
    found = module.dot_product_attention(*map(jnp.asarray, (query, key, value)))
    assert found.dtype == jnp.float64
    errors[module.__name__] = np.abs(np.asarray(found) - expected).max()
print("; ".join(f"{name} {error:.1e}" for name, error in errors.items()))
assert 1e-10 < errors["jax.nn"] < 1e-6 and 1e-10 < errors["flax.nnx"] < 1e-6
assert errors["flax.linen"] < 1e-13
PY
