#!/usr/bin/env bash
# Flax 0.12.8 and jax 0.10.2: with param_dtype=bfloat16 the default kernel of nnx.Linear has a negative mean.
# In bfloat16, jax.random.normal draws from 128 values between -2.89 and 2.52, with mean -0.012. Uniform and
# truncated normal draws are biased in the same way. A sum over many inputs shows the bias: 4096 inputs that
# are all 1 give outputs around -1.2, where float32 gives outputs around 0, both with deviation 1. To avoid
# it, initialize in float32 and cast.
#
# Seen: "float32: outputs -0.0 on average", "bfloat16: outputs -1.2 on average", and
# "normal: 128 values from -2.89 to 2.52, mean -0.012". Fails if that changes. CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 flax==0.12.8
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

means = {}
for dtype in (jnp.float32, jnp.bfloat16):
    layer = nnx.Linear(4096, 512, param_dtype=dtype, rngs=nnx.Rngs(0))
    outputs = np.asarray(layer.kernel[...], np.float64).sum(axis=0)  # of inputs that are all 1
    name = jnp.dtype(dtype).name
    means[name] = outputs.mean()
    print(f"{name}: outputs {means[name]:.1f} on average")
draws = np.asarray(jax.random.normal(jax.random.key(0), (2**20,), jnp.bfloat16), np.float64)
values = np.unique(draws)
print(
    f"normal: {len(values)} values from {values[0]:.2f} to {values[-1]:.2f}, mean {draws.mean():.3f}"
)
assert abs(means["float32"]) < 0.2 and -1.4 < means["bfloat16"] < -1.0
assert len(values) == 128 and values[-1] < 2.6 < 2.8 < -values[0]
assert -0.02 < draws.mean() < -0.006
PY
