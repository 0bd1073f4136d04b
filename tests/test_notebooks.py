"""The notebooks of the site are complete. Building the site runs them."""

import ast
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.md"))
CELL = re.compile(r"^```\{code-cell\}[^\n]*\n(?::[^\n]*\n)*(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda page: page.stem)
def test_a_notebook_has_a_kernel_and_python_cells(page):
    text = page.read_text()
    assert re.match(r"---\njupytext:\n.*?kernelspec:\n.*?\n---\n\n# ", text, re.DOTALL)
    cells = CELL.findall(text)
    assert len(cells) == text.count("{code-cell}") > 0
    for cell in cells:
        ast.parse(cell)


@pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda page: page.stem)
def test_the_gallery_shows_a_notebook(page):
    gallery = (DOCS / "gallery.md").read_text()
    assert f":link: notebooks/{page.stem}\n" in gallery
    assert f"\nnotebooks/{page.stem}\n" in gallery  # in the tree of contents
    picture = DOCS / "notebooks" / "thumbnails" / f"{page.stem}.png"
    assert f":img-top: notebooks/thumbnails/{picture.name}\n" in gallery
    assert picture.stat().st_size <= 40_000
