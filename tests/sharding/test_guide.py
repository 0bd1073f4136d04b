"""The Python of docs/meshes.md runs as printed."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp

GUIDE = (Path(__file__).parents[2] / "docs" / "meshes.md").read_text()


def test_the_guide_runs_from_top_to_bottom():
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    assert len(blocks) == 3
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(names["updates"]))
