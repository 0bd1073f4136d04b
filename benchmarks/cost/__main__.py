"""The command line of the benchmarks of cost."""

import sys

from benchmarks.command_line import main

COMMANDS = (
    "optimizer-step",
    "training-step",
    "floor",
    "growth",
    "peak-memory",
    "beside-peft",
    "compile-time",
    "precision",
    "low-precision",
    "casts",
    "export",
    "method-costs",
    "figures",
)

if __name__ == "__main__":
    sys.exit(main("cost", COMMANDS))
