"""The command line of the benchmark of matrix factorization."""

import sys

from benchmarks.command_line import run_module

if __name__ == "__main__":
    sys.exit(run_module("benchmarks.factorization.measure", "python -m benchmarks.factorization"))
