"""Three processes of one run agree on the outcome of each save."""

import json
import os
import socket
import subprocess
import sys

RUN = """
import json, os, shutil, sys, time, warnings

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", 3, rank)
from loft_jax.checkpoint import CheckpointError, Checkpoints, UndeletedCheckpointWarning, _folder

mesh = jax.make_mesh((3,), ("x",))
place = NamedSharding(mesh, P("x"))
count = jax.jit(lambda k: jnp.arange(6.0) + k, out_shardings=place)
state = lambda step: {"adapter": {"w": count(step)}, "opt_state": {"n": step}}
events, publish, delete = [], _folder.publish, _folder.delete


def fails(*_):
    raise OSError(28, "No space left on device")


def attempt(step):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            checkpoints.save(step, **state(step))
            if rank == 1:
                time.sleep(0.5)  # a slow process
            checkpoints.wait()
            events.append(f"{step} saved")
        except CheckpointError as error:
            known = "No space left" in str(error) or "another process" in str(error)
            events.append(f"{step} failed" if known else f"{step}: {error}")
    events.extend("undeleted" for w in caught if w.category is UndeletedCheckpointWarning)


with Checkpoints(folder, keep=1, timeout_s=60) as checkpoints:
    attempt(1)
    if rank == 0:
        _folder.publish = fails
    attempt(2)
    _folder.publish = publish
    attempt(2)
    if rank == 0:
        _folder.delete = lambda folder, steps: ["2: it stays"]
    attempt(3)
    _folder.delete = delete
    attempt(4)
    events.append(list(checkpoints.steps()))
    restored = checkpoints.restore(**state(0))
    events.append([restored.step, float(jax.jit(jnp.sum)(restored.adapter["w"]))])
print(json.dumps(events))
"""


def test_a_failure_in_one_process_is_told_by_all_and_the_run_goes_on(tmp_path, fault):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, str(rank), port, str(tmp_path / "run")],
            env=environment | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    events = [json.loads(out.splitlines()[-1]) for out, _ in outputs if out]
    expected = ["1 saved", "2 failed", "2 saved", "3 saved", "undeleted", "4 saved", [4]]
    assert events == 3 * [[*expected, [4, 15.0 + 6 * 4]]], outputs
    fault(
        "process 0 cannot finish a save", "3 processes, one slow", "all tell it; saves again", "-"
    )
