"""docs/algorithm.md names the line of code of each equation: here it is held to the code."""

import ast
import importlib
import inspect
import re
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

import loft_jax
from loft_jax import loft_adamw

ROOT = Path(__file__).parents[1]
PACKAGE = Path(loft_jax.__file__).parent
PAGE = (ROOT / "docs" / "algorithm.md").read_text()
ROWS = re.findall(r"^\| .* \| `([\w/]+)\.py: ([\w.]+)` \| `([^`]+)` \|$", PAGE, flags=re.MULTILINE)


def without_spaces(text: str) -> str:
    return " ".join(text.split())


def test_every_row_of_the_table_is_read():
    lines = [line for line in PAGE.splitlines() if line.startswith("|") and ".py: " in line]
    assert len(ROWS) == len(lines) >= 20


@pytest.mark.parametrize(("module", "name", "line"), ROWS, ids=lambda text: text[:40])
def test_the_function_exists_and_states_the_equation(module, name, line):
    function = importlib.import_module("loft_jax." + module.replace("/", "."))
    for part in name.split("."):
        function = getattr(function, part)
    source = inspect.getsource(inspect.unwrap(function))
    assert without_spaces(line) in without_spaces(source)


def test_the_step_fits_on_a_page():
    assert len((PACKAGE / "algorithm" / "step.py").read_text().splitlines()) <= 150


def imports(path: Path) -> set[str]:
    """The modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            names.add(node.module or "")
    return names


def test_the_algorithm_imports_nothing_of_ours_outside_its_folder():
    for path in (PACKAGE / "algorithm").glob("*.py"):
        ours = {name for name in imports(path) if name.split(".")[0] == "loft_jax"}
        assert all(name.startswith("loft_jax.algorithm.") for name in ours), path.name


def test_the_way_from_update_to_the_step(monkeypatch, report):
    """Counts the functions of ours on the stack between a caller's `update` and `loft_step`."""
    from loft_jax.algorithm.calibrated import Calibrated

    params = {"lora_a": jnp.ones((11, 2)), "lora_b": jnp.zeros((2, 7))}
    tx = loft_adamw(1e-3)
    state = tx.init(params)
    stacks: list[list[str]] = []
    advance = Calibrated.advance

    def probe(*args, **kwargs):
        frame, stack = sys._getframe(1), []
        while frame is not None:
            code = frame.f_code
            if code.co_filename.startswith(str(PACKAGE)):
                file = Path(code.co_filename).relative_to(PACKAGE)
                stack.append(f"{file}: {code.co_qualname}")
            frame = frame.f_back
        stacks.append(stack[::-1])
        return advance(*args, **kwargs)

    monkeypatch.setattr(Calibrated, "advance", probe)
    tx.update(params, state, params)
    assert len(stacks) == 2  # once for each factor
    before, *inside = "\n".join(stacks[0]).partition("algorithm/step.py: loft_step\n")
    frames = before.splitlines()
    report(f"frames of loft_jax from update to loft_step: {len(frames)}")
    for frame in frames:
        report(f"  {frame}")
    assert inside[0] and len(frames) <= 8
