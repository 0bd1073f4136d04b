#!/usr/bin/env bash
# tensorboardX 2.6.5: the name of an event file has whole seconds. A second writer that opens the same folder in the
# same second gets the same file, and its events replace those of the first writer. `filename_suffix` tells them apart.
#
# Seen: "same second: 1 file, first writer's events lost; with a suffix: 2 files". Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tensorboardX==2.6.5 numpy==2.4.6 protobuf==7.36.2
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys
import time
from pathlib import Path

from tensorboardX import SummaryWriter


def write(folder, suffixes):
    time.sleep(1 - time.time() % 1)  # the beginning of a second
    for number, suffix in enumerate(suffixes):
        writer = SummaryWriter(str(folder), filename_suffix=suffix)
        writer.add_scalar(f"from_{number}", 1.0, 1)
        writer.close()
    files = list(folder.iterdir())
    content = b"".join(path.read_bytes() for path in files)
    return len(files), [f"from_{number}".encode() in content for number in range(2)]


same = write(Path(sys.argv[1]) / "same", ("", ""))
apart = write(Path(sys.argv[1]) / "apart", (".0", ".1"))
assert same == (1, [False, True]), same
assert apart == (2, [True, True]), apart
print("same second: 1 file, first writer's events lost; with a suffix: 2 files")
PY
