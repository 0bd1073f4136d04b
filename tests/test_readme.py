"""The Python of the README runs as printed, and the links of all pages resolve."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
DOCS = [page for page in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in page.parts]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]

X, Y = jnp.ones((8, 64)), jnp.ones((8, 32))


def run(block: str) -> dict:
    """The names that a block of the README defines."""
    names: dict = {}
    exec(block, names)
    return names


def frozen_weights(model) -> list:
    return [leaf.copy() for leaf in jax.tree.leaves(nnx.state(model, nnx.Not(nnx.LoRAParam)))]


def test_the_blocks_are_those_tested_here():
    kinds = ["nnx.jit", "LoraModel", "qwix_provider"]
    assert [next(kind for kind in kinds if kind in block) for block in BLOCKS] == kinds


def test_the_nnx_use_trains_the_adapter_alone():
    names = run(BLOCKS[0])
    model, before = names["model"], frozen_weights(names["model"])
    losses = [names["train_step"](model, names["optimizer"], X, Y) for _ in range(9)]
    assert losses[-1] < losses[0]
    assert all(map(jnp.array_equal, frozen_weights(model), before))


def test_the_linen_use_trains():
    names = run(BLOCKS[1])
    adapter, state, losses = names["adapter"], names["state"], []
    for _ in range(9):
        adapter, state, loss = names["train_step"](adapter, state, X, Y)
        losses.append(loss)
    assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # qwix uses names that Flax deprecated
def test_the_qwix_use_trains_with_the_step_of_the_nnx_one():
    pytest.importorskip("qwix", reason="qwix is not installed: its use is not shown")
    step, names = run(BLOCKS[0])["train_step"], run(BLOCKS[2])
    losses = [step(names["model"], names["optimizer"], X, Y) for _ in range(9)]
    assert losses[-1] < losses[0]


def test_the_test_command_is_that_of_ci():
    """It runs the commands of the README, in an environment of its own."""
    ci = (ROOT / ".ci" / "run").read_text()
    (command,) = re.findall(r"^python3 -m venv .* && pytest$", README, flags=re.MULTILINE)
    assert '-c constraints.txt -e ".[test]"' in command and '-c constraints.txt -e ".[test]"' in ci


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_relative_links_resolve(page):
    links = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", page.read_text())
    for link in {first or second for first, second in links}:
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_external_links_are_listed():
    """docs/external_links.txt holds the links that no test here can follow, to be looked at."""
    pattern = r"https?://[^\s)>\"`\]}]+[^\s)>\"`\]}.,;:]"
    found = {link for page in PAGES for link in re.findall(pattern, page.read_text())}
    listed = (ROOT / "docs" / "external_links.txt").read_text().splitlines()
    assert listed == sorted(found)
