"""Each file system call of a save fails once, and the process dies at each once.

`python tests/checkpoint/system_calls.py [--every N]` needs a C compiler and prints the table of
docs/checkpoints.md. It runs itself with `system_calls.c` preloaded. That process forks a process
for each case, before JAX starts, so that a case does not pay for imports.
"""

import argparse
import collections
import ctypes
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "killed": 0}


def build(folder: Path) -> Path | None:
    """Compiles the library to preload; None without a compiler."""
    compiler, library = shutil.which("cc"), folder / "system_calls.so"
    if compiler is None or sys.platform != "linux":
        return None
    source = Path(__file__).with_suffix(".c")
    flags = ["-shared", "-fPIC", "-O1", "-w", "-o", str(library), str(source), "-ldl"]
    subprocess.run([compiler, *flags], check=True)
    return library


def run(library: Path, every: int) -> dict[str, Any]:
    """Runs every n-th case, and returns what the process with the library found."""
    command = [sys.executable, __file__, "--inside", str(library), "--every", str(every)]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"LD_PRELOAD": str(library), "JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return json.loads(done.stdout.splitlines()[-1])


# What follows runs in the process with the library.


def state_of(step: int) -> dict[str, Any]:
    import numpy as np

    draw = np.random.default_rng(step).normal(size=(7, 5)).astype(np.float32)
    return {"adapter": {"w": draw, "b": draw[0]}, "opt_state": {"n": np.int32(step)}}


def in_fork(fn: Callable[[], Any]) -> Any:
    """Returns what a function returns in a forked process; None if the process died."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 0
        try:
            os.write(writer, json.dumps(fn()).encode())
        except BaseException:
            os.write(writer, json.dumps({"unexpected": traceback.format_exc()[-1500:]}).encode())
            status = 1
        os._exit(status)
    os.close(writer)
    text = b""
    while part := os.read(reader, 65536):
        text += part
    os.close(reader)
    os.waitpid(child, 0)
    return json.loads(text) if text else None


def checked_restore(folder: Path) -> int | None:
    """Returns the step that is restored, after checking its values; the next save succeeds."""
    import numpy as np

    from loft_jax.checkpoint import Checkpoints

    with Checkpoints(folder, keep=1) as checkpoints:
        found = checkpoints.restore(**state_of(0))
        if found is None:
            return None
        expected = state_of(found.step)
        np.testing.assert_array_equal(found.adapter["w"], expected["adapter"]["w"])
        np.testing.assert_array_equal(found.adapter["b"], expected["adapter"]["b"])
        assert found.opt_state["n"] == found.step
        assert checkpoints.save(found.step + 1, **state_of(found.step + 1))
        checkpoints.wait()
        return found.step


def save_and_delete(folder: Path) -> None:
    """Opens a folder that has step 1, saves step 2, and deletes step 1."""
    from loft_jax.checkpoint import Checkpoints

    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(2, **state_of(2))
        checkpoints.wait()


def with_fault(library: ctypes.CDLL, folder: Path, number: int, error: int) -> dict[str, Any]:
    """Saves with the fault, and goes on without it, in this process."""
    from loft_jax.checkpoint import CheckpointError, UndeletedCheckpointWarning

    told, saved = "nothing", False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        library.arm(os.fsencode(folder), number, error)
        try:
            save_and_delete(folder)
            saved = True
        except CheckpointError as problem:
            told = "error"
            assert str(folder) in str(problem), problem
        calls = library.disarm()
    if any(warning.category is UndeletedCheckpointWarning for warning in caught):
        told = "warning"
    name = library.name_of(number).decode()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step = checked_restore(folder)
    left = sorted(path.name for path in folder.iterdir())
    return {"told": told, "saved": saved, "step": step, "calls": calls, "name": name, "left": left}


def outcome(library: ctypes.CDLL, template: Path, place: Path, number: int, error: int) -> str:
    """Returns how one case ended: "survived: ..." or what was lost."""
    folder = place / f"{number} {error}"
    shutil.copytree(template, folder)
    if error:
        found = in_fork(lambda: with_fault(library, folder, number, error))
    else:
        acknowledged = place / f"acknowledged {number}"

        def killed() -> None:
            library.arm(os.fsencode(folder), number, 0)
            save_and_delete(folder)
            acknowledged.write_text("")

        in_fork(killed)

        def resumed() -> dict[str, Any]:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                step = checked_restore(folder)
            left = sorted(path.name for path in folder.iterdir())
            saved = acknowledged.exists()
            return {"told": "nothing", "saved": saved, "step": step, "left": left}

        found = in_fork(resumed)
    shutil.rmtree(folder)
    if found is None or "unexpected" in found:
        return f"LOST: {found}"
    name = found.get("name", "")
    if found["step"] is None or found["step"] < 1 + found["saved"]:
        return f"LOST: {name}: {found}"
    if len(found["left"]) != 1:
        return f"LEFT BEHIND: {name}: {found}"
    if error and not found["saved"] and found["told"] != "error":
        return f"SILENT: {name}: {found}"
    return f"survived, step {found['step']} restored, told {found['told']}"


def inside(library_path: str, every: int) -> dict[str, Any]:
    library = ctypes.CDLL(library_path)
    library.name_of.restype = ctypes.c_char_p
    library.disarm.restype = ctypes.c_long
    library.arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int]

    import jax  # imported once, before the forks
    import orbax.checkpoint

    import loft_jax.checkpoint

    assert jax and orbax.checkpoint and loft_jax.checkpoint
    place = Path(tempfile.mkdtemp())
    template = place / "template"

    def first() -> None:
        from loft_jax.checkpoint import Checkpoints

        with Checkpoints(template) as checkpoints:
            checkpoints.save(1, **state_of(1))

    in_fork(first)

    def count() -> dict[str, Any]:
        folder = place / "count"
        shutil.copytree(template, folder)
        library.arm(os.fsencode(folder), -1, 0)
        save_and_delete(folder)
        calls = library.disarm()
        return {"calls": [library.name_of(n).decode() for n in range(1, calls + 1)]}

    calls = in_fork(count)["calls"]
    outcomes = {kind: collections.Counter() for kind in ERRORS}
    begin = time.monotonic()
    for offset, (kind, error) in enumerate(ERRORS.items()):
        for number in range(1 + offset % every, len(calls) + 1, every):
            text = outcome(library, template, place, number, error)
            outcomes[kind][text] += 1
            print(kind, number, text, file=sys.stderr, flush=True)
    shutil.rmtree(place)
    return {
        "calls": collections.Counter(calls),
        "outcomes": outcomes,
        "seconds": round(time.monotonic() - begin, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--every", type=int, default=1, help="only every n-th case")
    parser.add_argument("--inside")
    arguments = parser.parse_args()
    if arguments.inside:
        print(json.dumps(inside(arguments.inside, arguments.every)))
        return
    library = build(Path(tempfile.mkdtemp()))
    if library is None:
        sys.exit("a C compiler and Linux are needed")
    found = run(library, arguments.every)
    print(f"calls of one save: {found['calls']}; {found['seconds']} s")
    for kind, outcomes in found["outcomes"].items():
        for text, times in sorted(outcomes.items()):
            print(f"{kind:8} {times:4} {text}")


if __name__ == "__main__":
    main()
