"""The command line of the benchmarks of serving."""

import sys

from benchmarks.command_line import main

COMMANDS = ("compare",)

if __name__ == "__main__":
    sys.exit(main("serving", COMMANDS))
