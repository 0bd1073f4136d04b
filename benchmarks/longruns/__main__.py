"""The command line of the long runs."""

import sys

from benchmarks.command_line import main

if __name__ == "__main__":
    sys.exit(main("longruns", ["cost", "figures", "report", "sensing", "suite", "table", "train"]))
