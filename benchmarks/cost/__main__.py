"""The command line of the benchmarks of cost."""

import sys

from benchmarks.command_line import main

COMMANDS = (
    "optimizer-step",
    "training-step",
    "floor",
    "growth",
    "tree-size",
    "peak-memory",
    "beside-peft",
    "generation",
    "load-memory",
    "compile-time",
    "precision",
    "low-precision",
    "bfloat16-training",
    "balance",
    "casts",
    "export",
    "factor-condition",
    "order-of-sums",
    "drift",
    "method-costs",
    "figures",
)

if __name__ == "__main__":
    sys.exit(main("cost", COMMANDS))
