#!/usr/bin/env bash
# jax 0.10.2: jax.lax.top_k ranks a NaN by its sign bit: above inf without it, below -inf with it. argmax, max
# and sort ignore the sign. On x86, 0/0 and inf - inf give a NaN with the sign bit set, so top-k sampling
# drops a broken logit that argmax reports. top_k also ranks 0.0 above -0.0, although its documentation says
# that the lower index comes first if two elements are equal. There, too, top_k(x, 1) and argmax(x) differ.
#
# Seen: "nan: top_k 1, argmax 1", "-nan: top_k 2, argmax 1", "zeros: top_k 1, argmax 0".
# Fails if that changes. CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
import numpy as np

nan = np.array([0x7FC00000, 0xFFC00000], np.uint32).view(np.float32)
inputs = {
    "nan": [-np.inf, nan[0], np.inf],
    "-nan": [-np.inf, nan[1], np.inf],
    "zeros": [-0.0, 0.0],
}
seen = {}
for name, values in inputs.items():
    x = jnp.array(np.array(values, np.float32))
    _, ranked = jax.lax.top_k(x, len(x))
    seen[name] = int(ranked[0]), int(jnp.argmax(x))
    print(f"{name}: top_k {seen[name][0]}, argmax {seen[name][1]}")
    if name == "-nan":
        assert ranked.tolist() == [2, 0, 1] and jnp.isnan(jnp.sort(x)[-1])
assert seen == {"nan": (1, 1), "-nan": (2, 1), "zeros": (1, 0)}
PY
