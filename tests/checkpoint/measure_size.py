"""How time and memory of a checkpoint grow with its size: figures of docs/checkpoints.md.

python tests/checkpoint/measure_size.py [planning | saving]

"planning" is what `restore` does before it reads arrays: it parses the record and compares paths,
shapes, options and shardings with abstract targets, here of up to 200 GB. "saving" saves and
restores random numbers, each case in a process of its own. It prints seconds passed and seconds of
processor time, and fits to the latter

    seconds = fixed + per leaf * leaves + per GB * gigabytes
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from loft_jax.checkpoint import Checkpoints, _reading
from loft_jax.checkpoint._leaves import LeafRecord
from loft_jax.checkpoint._record import Record, parse

PLANNING = ((500, 2), (500, 200), (5_000, 200), (50_000, 200))
SAVING = ((200, 0.05), (200, 0.5), (200, 1.5), (1_000, 0.05), (5_000, 0.05), (5_000, 0.5))
"""Numbers of leaves and gigabytes."""


def shape_of(leaves: int, gigabytes: float) -> tuple[int, int]:
    """Of a leaf, in float32."""
    return 16, max(1, round(gigabytes * 1e9 / leaves / 4 / 16))


def plan(leaves: int, gigabytes: float) -> dict[str, Any]:
    """Plans the restore of a checkpoint that is not there."""
    shape, paths = shape_of(leaves, gigabytes), [f"layer{k}/lora_a" for k in range(leaves)]
    saved = dict.fromkeys(paths, LeafRecord(shape, "float32", "0" * 16))
    text = json.dumps(Record(1, {"adapter": saved}, {"adapter": {}}).to_json())
    place = NamedSharding(jax.make_mesh((1,), ("x",)), P(None, "x"))
    wanted = {path: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place) for path in paths}
    tracemalloc.start()
    began = time.process_time()  # one thread, no waiting
    record = parse(text, 1)
    _reading._check_trees("here", record, {"adapter": wanted}, {"adapter": wanted})
    _reading._check_placement("here", record, {"adapter": wanted})
    taken, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "seconds": round(taken, 3),
        "peak_mb": round(peak / 1e6, 1),
        "record_mb": len(text) / 1e6,
    }


def save(leaves: int, gigabytes: float) -> dict[str, Any]:
    """Saves twice, and restores."""
    rng, shape = np.random.default_rng(0), shape_of(leaves, gigabytes)
    tree = {f"layer{k}": jnp.asarray(rng.random(shape, np.float32)) for k in range(leaves)}
    folder, peak = Path(tempfile.mkdtemp()), lambda: resource.getrusage(resource.RUSAGE_SELF)
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(0, adapter={"x": next(iter(tree.values()))}, opt_state=())  # compiles
        checkpoints.wait()
        wall, cpu = time.perf_counter, time.process_time
        before, began = peak().ru_maxrss, (wall(), cpu())
        since = lambda: [round(wall() - began[0], 2), round(cpu() - began[1], 2)]
        checkpoints.save(1, adapter=tree, opt_state=())
        checkpoints.wait()
        saved = since()
        of_save = peak().ru_maxrss - before
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        began = wall(), cpu()
        checkpoints.restore(adapter=tree)
        restored = since()
    shutil.rmtree(folder)
    in_memory = sum(x.nbytes for x in tree.values())
    return {
        "save": saved,
        "restore": restored,
        "memory_of_save": round(of_save * 1024 / in_memory, 2),
        "on_disk": round(size / in_memory, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="?", choices=("planning", "saving"), default="planning")
    planning = parser.parse_args().what == "planning"
    found = {}
    for case in PLANNING if planning else SAVING:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[case] = pool.apply(plan if planning else save, case)
        print(case, found[case], flush=True)
    if planning:
        return
    terms = np.array([[1, leaves, gigabytes] for leaves, gigabytes in found])
    for column in ("save", "restore"):
        seconds = np.array([row[column][1] for row in found.values()])
        # Relative errors count, so that the largest case does not decide alone.
        fit = np.linalg.lstsq(terms / seconds[:, None], np.ones(len(found)), rcond=None)[0]
        off = np.abs(terms @ fit / seconds - 1).max()
        print(
            f"{column}: {fit[0]:.2f} s + {fit[1] * 1e3:.2f} ms a leaf + {fit[2]:.2f} s a GB, "
            f"within {off:.0%}; 200 GB in 5,000 leaves: {fit @ [1, 5_000, 200]:.0f} s"
        )


if __name__ == "__main__":
    main()
