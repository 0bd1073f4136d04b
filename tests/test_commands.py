"""Each `python` command that the documentation quotes exists, and its options parse."""

import argparse
import ast
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
SCRIPTS = [*ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/**/*.py")]
COMMAND = re.compile(r"python (-m benchmarks\S*|\S+\.py)")


def quoted(text: str) -> Iterator[str]:
    """The commands in code spans, and those at the beginning of a line or after `&&`."""
    text = re.sub(r"\\\n\s*", "", text)
    spans = re.findall(r"`(python [^`]+)`", text)
    lines = [part for line in text.splitlines() for part in line.split("&&")]
    for command in (" ".join(part.split()) for part in [*spans, *lines]):
        if COMMAND.match(command):
            yield command.removesuffix(" &")


def docstrings(path: Path) -> str:
    tree = ast.parse(path.read_text())
    kinds = (ast.Module, ast.FunctionDef, ast.ClassDef)
    return "\n".join(ast.get_docstring(x) or "" for x in ast.walk(tree) if isinstance(x, kinds))


TEXTS = [*(path.read_text() for path in PAGES), *map(docstrings, SCRIPTS)]
COMMANDS = sorted({command for text in TEXTS for command in quoted(text)})


class Parsed(BaseException):
    """The options were parsed: nothing else should run."""


@pytest.fixture
def parse(monkeypatch):
    """Runs a command until its options are parsed."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(*args, **kwargs):
        parse_args(*args, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)

    def parse(command: str) -> None:
        _, *arguments = shlex.split(command, comments=True)
        if arguments[0] == "-m":
            _, module, *arguments = arguments
            start = lambda: runpy.run_module(module, run_name="__main__")
        else:
            module, *arguments = arguments
            path = ROOT / module
            if "parse" not in path.read_text():  # the script has no options
                assert not arguments
                return
            start = lambda: runpy.run_path(str(path), run_name="__main__")
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(Parsed):
            start()

    return parse


@pytest.mark.parametrize("command", [x for x in COMMANDS if "--help" not in x])
def test_quoted_commands_parse(parse, command):
    parse(command)


@pytest.mark.parametrize("command", [x for x in COMMANDS if "--help" in x])
def test_quoted_calls_for_help_succeed(parse, command, capsys):
    with pytest.raises(SystemExit, match="0"):
        parse(command)
    assert capsys.readouterr().out.startswith("usage: ")


def test_all_packages_and_scripts_are_quoted():
    text = "\n".join(COMMANDS)
    for folder in ROOT.glob("benchmarks/*/__main__.py"):
        assert f"python -m benchmarks.{folder.parent.name} " in text
    for script in ROOT.glob("examples/[a-z]*.py"):
        assert f"python examples/{script.name}" in text


@pytest.mark.parametrize("command", ["cost nothing", "cost floor --nothing", "scaling tables 1"])
def test_wrong_commands_do_not_parse(parse, command, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(f"python -m benchmarks.{command}")
