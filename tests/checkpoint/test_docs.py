"""The guide's example runs as printed, and resumes where it stopped."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from optimizers import hasty_compiler as hasty_compiler

import loft_jax

GUIDE = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
(BLOCK,) = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)


# The model, and what trains it. It is compiled once for all runs.
MODEL, LOOP = BLOCK.split("\nreference = ")


def run(model: dict, folder: Path, steps: int, loop: str) -> dict:
    names = model | {"folder": folder, "steps": steps}
    exec(loop, names)
    return names


def test_the_example_resumes_and_answers_sigterm(tmp_path):
    model: dict = {}
    exec(MODEL, model)
    loop = "reference = " + LOOP
    whole = run(model, tmp_path / "whole", 24, loop)
    run(model, tmp_path / "parts", 13, loop)
    model["interrupt"] = lambda step: step == 17 and signal.raise_signal(signal.SIGTERM)
    at_17 = loop.replace("        step += 1\n", "        step += 1\n        interrupt(step)\n")
    assert run(model, tmp_path / "parts", 24, at_17)["step"] == 17
    resumed = run(model, tmp_path / "parts", 24, loop)
    assert resumed["step"] == 24 and resumed["data"] == {"batch": 17}
    for name in ("adapter", "state"):
        pairs = zip(jax.tree.leaves(resumed[name]), jax.tree.leaves(whole[name]), strict=True)
        assert all(np.array_equal(x, y) for x, y in pairs)
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == ["20", "24"]


def test_importing_the_package_does_not_import_orbax():
    code = "import sys, loft_jax; print(any(name.startswith('orbax') for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_one_module_uses_orbax_and_by_public_names():
    package = Path(loft_jax.__file__).parent
    texts = {path.name: path.read_text() for path in package.rglob("*.py")}
    users = [name for name, text in texts.items() if re.search(r"\b(from|import) orbax", text)]
    assert users == ["_storage.py"]
    names = re.findall(r"\bocp((?:\.\w+)+)|\borbax((?:\.\w+)+)", texts["_storage.py"])
    assert len(names) > 10 and not [name for name in names if "._" in "".join(name)]
