"""Cost of a checkpoint of a 5M-parameter adapter: the figures of docs/checkpoints.md.

python tests/checkpoint/measure_cost.py
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax

from loft_jax import loft_adamw
from loft_jax.checkpoint import Checkpoints, digests

LAYERS, KERNELS, WIDTH, RANK = 24, "qkvogu", 2048, 8


def random_adapter() -> Any:
    shapes = {"lora_a": (WIDTH, RANK), "lora_b": (RANK, WIDTH)}
    draw = lambda key: {name: jax.random.normal(key, shape) for name, shape in shapes.items()}
    keys = jax.random.split(jax.random.key(0), (LAYERS, len(KERNELS)))
    return [{name: draw(keys[i, j]) for j, name in enumerate(KERNELS)} for i in range(LAYERS)]


def random_like(tree: Any) -> Any:
    # A fresh state consists of zeros, which would compress to nothing.
    draw = lambda x: jax.random.normal(jax.random.key(x.size), x.shape, x.dtype) if x.ndim else x
    return jax.tree.map(draw, tree)


def seconds(fn: Callable[[], Any], times: int = 5) -> float:
    """Returns the median of a few calls."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        fn()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main() -> None:
    adapter = jax.jit(random_adapter)()
    for second_moment in ("factored", "calibrated"):
        state = jax.jit(random_like)(loft_adamw(0.1, second_moment=second_moment).init(adapter))
        arrays = {str(k): x for k, x in enumerate(jax.tree.leaves((adapter, state)))}
        count = lambda tree: sum(x.size for x in jax.tree.leaves(tree)) / 1e6
        print(
            f"{second_moment}: adapter {count(adapter):.1f} M numbers, state {count(state):.1f} M, "
            f"{sum(x.nbytes for x in arrays.values()) / 1e6:.0f} MB in {len(arrays)} arrays"
        )
        first = seconds(lambda arrays=arrays: digests(arrays), 1)
        print(
            f"  digests   {seconds(lambda arrays=arrays: digests(arrays)):.2f} s, first {first:.2f}"
        )
        folder = Path(tempfile.mkdtemp())
        blocked, whole = [], []
        with Checkpoints(folder) as checkpoints:
            for step in range(6):
                start = time.perf_counter()
                checkpoints.save(step, adapter=adapter, opt_state=state)
                blocked.append(time.perf_counter() - start)
                checkpoints.wait()
                whole.append(time.perf_counter() - start)
            restore = seconds(partial(checkpoints.restore, adapter=adapter, opt_state=state))
        size = sum(p.stat().st_size for p in (folder / "5").rglob("*") if p.is_file())
        record = (folder / "5" / "meta" / "metadata").stat().st_size
        print(f"  save      blocks {statistics.median(blocked[1:]):.2f} s, whole after ", end="")
        print(f"{statistics.median(whole[1:]):.2f} s")
        print(f"  restore   {restore:.2f} s")
        print(f"  on disk   {size / 1e6:.0f} MB, of which the record {record / 1e6:.2f} MB")
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
