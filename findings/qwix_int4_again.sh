#!/usr/bin/env bash
# qwix 0.1.8: int4 weights change each time they are dequantized and quantized again, without any change between. The
# largest magnitude is mapped to 7.5, between two codes. If it is negative, it becomes -8 and so grows by 16/15, if
# positive 7, and shrinks by 14/15; the next scale, which all others share, follows. The integers -7 to 7, which
# 4 bits can hold, come back as -7.47 to 6.53, and after ten rounds as -11.68 to 10.22. Merging one adapter after
# another into quantized weights adds this up. nf4 gives the same values from the first round on.
#
# Seen: "int4: -7.47 to 6.53, then -11.68 to 10.22", "nf4: -7.00 to 7.00, then -7.00 to 7.00".
# Fails if that changes. CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check qwix==0.1.8 jax==0.10.2
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY' 2>/dev/null
import jax.numpy as jnp
import qwix


def rounds(qtype):
    x, ranges = jnp.arange(-7.0, 8.0), []
    for _ in range(10):
        x = qwix.dequantize(qwix.quantize(x, qtype))
        ranges.append((float(x.min()), float(x.max())))
    return ranges[0], ranges[-1]


for qtype in ("int4", "nf4"):
    (low, high), (lowest, highest) = rounds(qtype)
    print(f"{qtype}: {low:.2f} to {high:.2f}, then {lowest:.2f} to {highest:.2f}")
    if qtype == "int4":
        assert low < -7.4 and high < 6.6 and lowest < -11 and highest > 10
    else:
        assert (low, high) == (lowest, highest) == (-7, 7)
PY
