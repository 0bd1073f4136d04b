"""The command line of the accuracy study."""

import sys

from benchmarks.command_line import main

if __name__ == "__main__":
    sys.exit(main("accuracy", ("run", "report")))
