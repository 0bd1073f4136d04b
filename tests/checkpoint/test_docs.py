"""The guide's example runs as printed, and goes on where it stopped."""

import re
import signal
from pathlib import Path

import jax
import numpy as np
from optimizers import hasty_compiler as hasty_compiler

GUIDE = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
(BLOCK,) = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)


def run(folder: Path, steps: int, block: str = BLOCK) -> dict:
    names = {"folder": folder, "steps": steps}
    exec(block, names)
    return names


def test_the_example_is_taken_up_again_and_answers_sigterm(tmp_path):
    whole = run(tmp_path / "whole", 24)
    run(tmp_path / "parts", 13)
    interrupted = BLOCK.replace(
        "        step += 1\n", "        step += 1\n        interrupt(step)\n"
    )
    names = {"folder": tmp_path / "parts", "steps": 24}
    names["interrupt"] = lambda step: step == 17 and signal.raise_signal(signal.SIGTERM)
    exec(interrupted, names)
    assert names["step"] == 17
    resumed = run(tmp_path / "parts", 24)
    assert resumed["step"] == 24 and resumed["data"] == {"batch": 17}
    for name in ("adapter", "state"):
        pairs = zip(jax.tree.leaves(resumed[name]), jax.tree.leaves(whole[name]), strict=True)
        assert all(np.array_equal(x, y) for x, y in pairs)
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == ["20", "24"]


def test_the_package_does_not_need_orbax_to_be_imported():
    import subprocess
    import sys

    code = "import sys, loft_jax; print(any(name.startswith('orbax') for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
