#!/usr/bin/env bash
# tensorstore 0.1.86: each KvStore.Spec(...).to_json() leaves four small strings in memory for good,
# about 200 bytes. Orbax calls it several times for each array it saves, so that a process that saves
# checkpoints grows by some kB a save.
#
# Seen: "4.1 objects a call". Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tensorstore==0.1.86
"$folder/venv/bin/python" - <<'PY'
import gc
import tracemalloc

import tensorstore as ts

calls = 5000
ts.KvStore.Spec({"driver": "file", "path": "/tmp/x/"}).to_json()
tracemalloc.start()
before = tracemalloc.take_snapshot()
for k in range(calls):
    ts.KvStore.Spec({"driver": "file", "path": f"/tmp/x{k}/"}).to_json()
gc.collect()
differences = tracemalloc.take_snapshot().compare_to(before, "filename")
left = sum(x.count_diff for x in differences) / calls
print(f"{left:.1f} objects a call")
assert 3.5 < left < 4.5
PY
