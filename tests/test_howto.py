"""The Python of each how-to page runs as printed, from the first block to the last."""

import re
from pathlib import Path

import pytest
from optimizers import hasty_compiler as hasty_compiler

# The pages on serving share a model, with which tests/serving/test_serving_docs.py runs them.
PAGES = sorted((Path(__file__).parents[1] / "docs" / "howto").glob("*.md"))
PAGES = [page for page in PAGES if not page.stem.startswith("serve_")]
NEEDS = {"quantized": "qwix", "own_models": "safetensors"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_run(page, tmp_path, monkeypatch):
    if page.stem in NEEDS:
        pytest.importorskip(NEEDS[page.stem], reason="an optional package of that page")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, page.name, "exec"), names)
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_the_pages_assert_what_they_show():
    for page in PAGES:
        blocks = "".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S))
        assert not blocks or "assert " in blocks, page.name
