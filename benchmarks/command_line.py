"""The command line of a package of benchmarks: each subcommand is a module.

The module's docstring is the help text, `add_arguments(parser)` declares its options if it has any,
and `run(options)` does the work. Only the module of the chosen subcommand is imported.
"""

import argparse
import ast
import contextlib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from examples.common.errors import exit_status

Formatter = argparse.RawDescriptionHelpFormatter


def main(folder: str, commands: Sequence[str], argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand of the package in benchmarks/FOLDER and returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    program = f"python -m benchmarks.{folder}"
    parser = argparse.ArgumentParser(prog=program, formatter_class=Formatter)
    parser.description = "\n".join(f"{name:16} {_summary(folder, name)}" for name in commands)
    parser.epilog = f"{program} COMMAND --help describes a command."
    parser.add_argument("command", choices=commands, metavar="COMMAND", help="one of these")
    name = parser.parse_known_args(argv[:1])[0].command
    return run_module(f"benchmarks.{folder}.{_module(name)}", f"{program} {name}", argv[1:])


def run_module(module: str, program: str, argv: Sequence[str] | None = None) -> int:
    """Parses the options of one module, runs it and returns the exit status."""
    command = importlib.import_module(module)
    parser = argparse.ArgumentParser(
        prog=program, description=command.__doc__, formatter_class=Formatter
    )
    if hasattr(command, "add_arguments"):
        command.add_arguments(parser)
    options = parser.parse_args(argv)
    with contextlib.suppress(BrokenPipeError):
        return exit_status(lambda: command.run(options))
    return 0


def add_results(parser: argparse.ArgumentParser) -> None:
    """Adds --results."""
    parser.add_argument("--results", type=Path, help="append the rows to this JSON-lines file")


def add_runs(parser: argparse.ArgumentParser, runs: int) -> None:
    """Adds --runs, with its default, and --results."""
    parser.add_argument("--runs", type=int, default=runs, help=f"repetitions (default {runs})")
    add_results(parser)


def _module(command: str) -> str:
    return command.replace("-", "_")


def _summary(folder: str, command: str) -> str:
    """The first line of a module's docstring, without importing the module."""
    path = Path(__file__).parent / folder / f"{_module(command)}.py"
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
