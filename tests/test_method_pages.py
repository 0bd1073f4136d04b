"""The pages of docs/methods: their examples print what they show, and no method lacks a page."""

import contextlib
import importlib
import inspect
import io
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from optimizers import hasty_compiler as hasty_compiler

import loft_jax
from loft_jax import baselines

DOCS = Path(__file__).parents[1] / "docs"
METHODS = sorted((DOCS / "methods").glob("*.md"))
PAGES = [*METHODS, DOCS / "howto" / "choose.md"]
EXAMPLE = re.compile(r"^```python\n(.*?)^```(?:\n\n```text\n(.*?)^```)?", re.MULTILINE | re.DOTALL)
ROLE = re.compile(r"\{py:\w+\}`([\w.]+)`")
FIGURE = re.compile(r"(?<!\d)(\d\.\d{3,}|\d\.\de-\d\d|[\d.]+(?= MB\b))")  # losses, sizes of states
REPORTS = "\n".join((DOCS / f"{name}.md").read_text() for name in ("accuracy", "results", "cost"))

by_name = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@pytest.mark.usefixtures("hasty_compiler")
@pytest.mark.parametrize("page", METHODS, ids=lambda page: page.stem)
def test_the_examples_print_what_the_page_shows(page):
    examples = EXAMPLE.findall(page.read_text())
    assert examples
    for code, shown in examples:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, {})
        assert printed.getvalue() == shown


def public_methods(module: ModuleType) -> Iterator[str]:
    """The public functions of a module that return a transformation; of the baselines, all."""
    for name, value in vars(module).items():
        if inspect.isfunction(value) and not name.startswith("_"):
            returned = str(inspect.signature(value).return_annotation)
            if module is baselines or "GradientTransformation" in returned:
                yield f"{module.__name__}.{name}"


@pytest.mark.parametrize("module", [loft_jax, baselines], ids=lambda module: module.__name__)
def test_every_method_has_a_page(module):
    described = {name for page in METHODS for name in ROLE.findall(page.read_text())}
    assert set(public_methods(module)) - described == set()


@by_name
def test_names_exist(page):
    for name in ROLE.findall(page.read_text()):
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


@by_name
def test_figures_are_those_of_the_reports(page):
    text = re.sub(r"^```.*?^```|\$\$.*?\$\$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    figures = set(FIGURE.findall(text))
    assert {figure for figure in figures if figure not in REPORTS} == set()


def test_every_page_is_in_the_table_of_contents():
    entries = re.findall(r"^methods/(\w+)$", (DOCS / "methods.md").read_text(), flags=re.MULTILINE)
    assert sorted(entries) == [page.stem for page in METHODS]
