"""Fine-tunes the language model of `finetune_llm.py` on several devices or processes.

    pip install -c constraints.txt -e ".[examples]"
    python examples/multi_device.py --mesh data=2,fsdp=2,tensor=2

The run and its flags are those of `finetune_llm.py`, but the weights, the adapters and LoFT's state
are sharded over a mesh: `data` shards the batch, `fsdp` the batch and the stored weights, `tensor`
the computation of a layer. Without an accelerator, the script uses eight CPU devices.

Hardware: the GPUs or TPUs that JAX finds, else 2 CPU cores and 7 GB of memory.
Time on 2 CPU cores: 8 min 20 s (5.2 s per step). Score: that of `finetune_llm.py` with these flags.

A killed run can be resumed on the same mesh or on another one:

    python examples/multi_device.py --resume --output runs/loft-1 --mesh fsdp=4,tensor=2

After Ctrl-C or SIGTERM the script saves its last step first. After SIGTERM it exits with status 75,
so that a scheduler can repeat the command.

Several processes (on a TPU pod or a GPU cluster, `--distributed` replaces the last three flags):

    python examples/multi_device.py --output runs/two --mesh fsdp=4,tensor=2 \\
        --coordinator 127.0.0.1:9731 --processes 2 --process 0 &
    python examples/multi_device.py --output runs/two --mesh fsdp=4,tensor=2 \\
        --coordinator 127.0.0.1:9731 --processes 2 --process 1
"""

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Callable, Sequence

import jax

from common.errors import UserError, exit_status
from common.llm_settings import parse_arguments
from common.meshes import make_mesh, parse_mesh
from finetune_llm import compare
from loft_jax.checkpoint import CheckpointDamaged, CheckpointError, CheckpointMismatch

DEFAULT_MESH = "data=2,fsdp=2,tensor=2"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 after an error message, 75 if preempted, 130 if interrupted."""
    given, rest = _parser().parse_known_args(argv)
    return exit_status(lambda: run(given, rest))


def run(given: argparse.Namespace, rest: Sequence[str]) -> None:
    """Connects to the other processes, if any, makes the mesh, and fine-tunes on it."""
    settings, output, resume = parse_arguments(rest)
    sizes = parse_mesh(given.mesh)
    several = given.distributed or given.processes > 1
    if given.processes < 1 or (given.processes > 1 and None in (given.coordinator, given.process)):
        raise UserError("Several processes need --coordinator, --processes and --process.")
    if several and output is None:
        raise UserError("Several processes need --output, so that all of them use one folder.")
    # The number of CPU devices must be set before JAX initializes them.
    if not given.distributed:
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", math.prod(sizes.values()) // given.processes)
    if not several:
        compare(settings, output, resume, make_mesh(sizes))
        return
    if given.distributed:
        jax.distributed.initialize()  # the cluster's environment specifies the arguments
    else:
        jax.distributed.initialize(
            given.coordinator,
            given.processes,
            given.process,
            heartbeat_timeout_seconds=given.timeout,
        )
    with_others(lambda: compare(settings, output, resume, make_mesh(sizes)), given, output)


def with_others(work: Callable[[], None], given: argparse.Namespace, output: object) -> None:
    """Calls `work` in one of several processes, and ends this process if another one stops."""
    remedy = (
        "Only the steps since the last checkpoint are lost: when all processes have ended, start "
        f"them with --resume --output {output}."
    )
    if jax.process_index() == 0:
        # Printed in advance: if a process dies during a collective, JAX itself ends the others.
        print(f"If a process stops, the others end within {given.timeout} s. {remedy}", flush=True)
    try:
        work()
    except (CheckpointMismatch, CheckpointDamaged):
        raise  # raised in all processes, so none waits for another
    except (jax.errors.JaxRuntimeError, CheckpointError) as error:
        reason = str(error).splitlines()[0][:200]
        print(
            f"\nerror: process {jax.process_index()} cannot continue: another process or the "
            f"network has failed ({reason}). {remedy}",
            file=sys.stderr,
            flush=True,
        )
        # sys.exit would wait for the missing process.
        os._exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Fine-tune on a mesh; also accepts the flags of finetune_llm.py.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--mesh", default=DEFAULT_MESH, help=f"size of each axis; default {DEFAULT_MESH}")
    add("--distributed", action="store_true", help="several processes, started by a cluster")
    add("--coordinator", help="address and port of process 0, without a cluster")
    add("--processes", type=int, default=1, help="number of processes; default 1")
    add("--process", type=int, help="number of this process, from 0")
    add("--timeout", type=int, default=60, help="seconds until a silent process counts as failed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
