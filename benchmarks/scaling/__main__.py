"""The command line of the benchmarks of scaling."""

import sys

from benchmarks.command_line import main

if __name__ == "__main__":
    sys.exit(main("scaling", ("compile", "tables", "predict", "one-device")))
