"""Cost of a checkpoint: the figures of docs/checkpoints.md.

python tests/checkpoint/measure_cost.py [wide | smollm2] [--saves N]

The adapters: "wide" has 24 layers of six kernels of width 2048 at rank 8, "smollm2" the 150 pairs
of SmolLM2-135M at rank 16.
"""

import argparse
import resource
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

# Rows and columns of the adapted kernels of a layer.
KERNELS = {
    "wide": (24, 8, dict.fromkeys("qkvogu", (2048, 2048))),
    "smollm2": (
        30,
        16,
        {"q": (576, 576), "k": (576, 192), "v": (576, 192), "up": (576, 1536), "down": (1536, 576)},
    ),
}


def random_adapter(name: str) -> Any:
    layers, rank, kernels = KERNELS[name]
    shapes = {
        kernel: {"lora_a": (m, rank), "lora_b": (rank, n)} for kernel, (m, n) in kernels.items()
    }
    is_shape = lambda x: isinstance(x, tuple)
    zeros = [jax.tree.map(jax.numpy.zeros, shapes, is_leaf=is_shape) for _ in range(layers)]
    return random_like(zeros)


def random_like(tree: Any) -> Any:
    """Random bits, which do not compress. Those of a fresh state are zeros."""
    bits = lambda x: jax.random.bits(jax.random.key(x.size), x.shape, f"uint{8 * x.dtype.itemsize}")
    draw = lambda x: jax.lax.bitcast_convert_type(bits(x), x.dtype) if x.ndim else x
    return jax.tree.map(draw, tree)


def seconds(fn: Callable[[], Any], times: int = 5) -> list[float]:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        fn()
        taken.append(time.perf_counter() - start)
    return taken


def median(times: list[float]) -> str:
    return f"{statistics.median(times):.3f} s ({min(times):.3f} to {max(times):.3f})"


def written() -> int:
    """Bytes that this process passed to write calls (Linux)."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("adapter", nargs="?", choices=KERNELS, default="smollm2")
    parser.add_argument("--saves", type=int, default=10)
    arguments = parser.parse_args()
    adapter = jax.jit(lambda: random_adapter(arguments.adapter))()
    for second_moment in ("factored", "calibrated"):
        state = jax.jit(random_like)(loft_adamw(0.1, second_moment=second_moment).init(adapter))
        arrays = {str(k): x for k, x in enumerate(jax.tree.leaves((adapter, state)))}
        in_memory = sum(x.nbytes for x in arrays.values())
        count = lambda tree: sum(x.size for x in jax.tree.leaves(tree)) / 1e6
        print(
            f"{second_moment}: adapter {count(adapter):.1f} M numbers, state {count(state):.1f} M, "
            f"{in_memory / 1e6:.1f} MB in {len(arrays)} arrays"
        )
        (first,) = seconds(lambda arrays=arrays: digests(arrays), 1)
        print(f"  digests   {median(seconds(lambda arrays=arrays: digests(arrays)))}")
        print(f"            {first:.2f} s the first time")
        folder = Path(tempfile.mkdtemp())
        blocked, whole, bytes_of = [], [], []
        with Checkpoints(folder) as checkpoints:
            for step in range(arguments.saves + 1):
                start, before = time.perf_counter(), written()
                checkpoints.save(step, adapter=adapter, opt_state=state)
                blocked.append(time.perf_counter() - start)
                checkpoints.wait()
                whole.append(time.perf_counter() - start)
                bytes_of.append(written() - before)
            restored = seconds(partial(checkpoints.restore, adapter=adapter, opt_state=state))
        newest = folder / str(arguments.saves)
        size = sum(p.stat().st_size for p in newest.rglob("*") if p.is_file())
        record = (newest / "meta" / "metadata").stat().st_size
        print(f"  save      blocks {median(blocked[1:])}")
        print(f"            complete after {median(whole[1:])}")
        print(f"  restore   {median(restored)}")
        print(
            f"  on disk   {size / 1e6:.1f} MB, {size / in_memory:.3f}x of the arrays', of which "
            f"the record {record / 1e6:.2f} MB; written {max(bytes_of) / in_memory:.3f}x"
        )
        shutil.rmtree(folder)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB")


if __name__ == "__main__":
    main()
