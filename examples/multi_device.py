"""Fine-tunes the language model of `finetune_llm.py` on a mesh of devices, or of several processes.

    pip install -c constraints.txt -e ".[examples]"
    python examples/multi_device.py --mesh data=2,fsdp=2,tensor=2

The same run as `finetune_llm.py`, with its flags, but with the weights, the adapters and LoFT's
state split over a mesh: `data` splits the batch, `fsdp` the batch and the weights at rest, `tensor`
what a layer computes. Where there is no accelerator, eight CPU devices stand in for them.

Hardware: any GPUs or TPUs that JAX sees; else 2 CPU cores, 7 GB of memory.
Time on 2 CPU cores: 8 min 20 s (5.2 s a step). Score: perplexity falls from 34.40 to 26.14.

Killed at any moment, by Ctrl-C, SIGTERM or worse, it goes on where it was:

    python examples/multi_device.py --resume --output runs/loft-1 --mesh fsdp=4,tensor=2

on this mesh or any other. After SIGTERM it has saved its last step, and exits with 75: a scheduler
may run the command again.

Several processes (on a TPU pod or a GPU cluster `--distributed` stands for the last three flags):

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
from errors import UserError, exit_status
from finetune_llm import finetune
from llm_settings import parse_arguments
from meshes import make_mesh, parse_mesh

from loft_jax.checkpoint import CheckpointDamaged, CheckpointError, CheckpointMismatch

DEFAULT_MESH = "data=2,fsdp=2,tensor=2"


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 after a message to the user, 75 if preempted, 130 if interrupted."""
    given, rest = _parser().parse_known_args(argv)
    return exit_status(lambda: run(given, rest))


def run(given: argparse.Namespace, rest: Sequence[str]) -> None:
    """Joins the other processes, if any, makes the mesh, and fine-tunes on it."""
    settings, output, resume = parse_arguments(rest)
    sizes = parse_mesh(given.mesh)
    several = given.distributed or given.processes > 1
    if given.processes < 1 or (given.processes > 1 and None in (given.coordinator, given.process)):
        raise UserError("Several processes need --coordinator, --processes and --process.")
    if several and output is None:
        raise UserError("Several processes need --output, so that all of them use one folder.")
    # CPU devices are as many as are asked for, if that is said before JAX looks for them.
    if not given.distributed:
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", math.prod(sizes.values()) // given.processes)
    if not several:
        finetune(settings, output, resume, make_mesh(sizes))
        return
    if given.distributed:
        jax.distributed.initialize()  # the cluster's environment says the rest
    else:
        jax.distributed.initialize(
            given.coordinator,
            given.processes,
            given.process,
            heartbeat_timeout_seconds=given.timeout,
        )
    with_the_others(lambda: finetune(settings, output, resume, make_mesh(sizes)), given, output)


def with_the_others(work: Callable[[], None], given: argparse.Namespace, output: object) -> None:
    """Does the work in one of several processes, none of which can go on without the others."""
    remedy = (
        "Nothing is lost but the steps since the last checkpoint: once all have ended, start them "
        f"with --resume --output {output}."
    )
    if jax.process_index() == 0:
        # Said in advance: where a process dies in the middle of a sum, JAX ends the others itself.
        print(f"If a process stops, the others end within {given.timeout} s. {remedy}", flush=True)
    try:
        work()
    except (CheckpointMismatch, CheckpointDamaged):
        raise  # all processes find the same, and none is waited for
    except (jax.errors.JaxRuntimeError, CheckpointError) as error:
        reason = str(error).splitlines()[0][:200]
        print(
            f"\nerror: process {jax.process_index()} cannot go on: another process of the run has "
            f"stopped, or the network between them ({reason}). {remedy}",
            file=sys.stderr,
            flush=True,
        )
        # Not sys.exit: at exit JAX would wait for the process that is gone.
        os._exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Fine-tune on a mesh; takes the flags of finetune_llm.py as well.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--mesh", default=DEFAULT_MESH, help=f"size of each axis; default {DEFAULT_MESH}")
    add("--distributed", action="store_true", help="several processes, as the cluster has them")
    add("--coordinator", help="address and port of process 0, where no cluster says it")
    add("--processes", type=int, default=1, help="how many processes there are; default 1")
    add("--process", type=int, help="the number of this one, from 0")
    add("--timeout", type=int, default=60, help="seconds after which a silent process is given up")
    return parser


if __name__ == "__main__":
    sys.exit(main())
