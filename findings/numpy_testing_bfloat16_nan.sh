#!/usr/bin/env bash
# numpy 2.4.6 and ml_dtypes 0.6.0: numpy.testing.assert_array_equal treats NaN as equal to NaN, except
# in bfloat16, where an array with a NaN is not equal to its own copy. numpy.array_equal with
# equal_nan and numpy.testing.assert_allclose do treat them as equal in bfloat16.
#
# Seen: "float16 True True True", "float32 True True True", "bfloat16 False True True".
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 ml_dtypes==0.6.0
"$folder/venv/bin/python" - <<'PY'
import ml_dtypes
import numpy as np


def holds(check, *arrays):
    try:
        check(*arrays)
    except AssertionError:
        return False
    return True


seen = {}
for dtype in (np.float16, np.float32, ml_dtypes.bfloat16):
    x = np.array([1, np.nan], dtype)
    checks = (np.testing.assert_array_equal, np.testing.assert_allclose)
    strict, close = (holds(check, x, x.copy()) for check in checks)
    seen[np.dtype(dtype).name] = (strict, bool(np.array_equal(x, x, equal_nan=True)), close)
    print(np.dtype(dtype).name, *seen[np.dtype(dtype).name])
assert seen == {
    "float16": (True, True, True),
    "float32": (True, True, True),
    "bfloat16": (False, True, True),
}
PY
